"""Read off the code of a callback, or of a module, whether a hook loads weights into the module.

Packages bring callbacks that load the best weights when training ends. A user should hear at the start that another
callback writes over them, and at the start nothing but their code shows what they will do. What it does not show is
left to :mod:`~lightning_optim.runtime.final_weights`, which compares the weights at the end.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from lightning_optim.runtime.lightning import LightningModule, StochasticWeightAveraging, WeightAveraging
from lightning_optim.runtime.lightning.packages import package_of

_AVERAGES = (StochasticWeightAveraging, WeightAveraging)
_LOADING = {"load_state_dict", "load_model_state_dict", "set_model_state_dict"}
_NOT_READ = {"lightning", "lightning_fabric", "lightning_optim", "pytorch_lightning", "torch"}


def writes_weights(owner: Any, hook: str) -> str:
    """Return what a hook of a callback or a module does, if it loads weights into the module as far as its code shows.

    The hook, or a method of the same object that it uses, calls ``load_state_dict`` or the like on the module, and asks
    no attribute or hyper-parameter such as ``load_best_on_end`` or ``restore_best`` that is False. Lightning's own
    averages write theirs in ``on_train_end``.
    """
    defined_in = next((kind for kind in type(owner).__mro__ if hook in vars(kind)), type(owner))
    if isinstance(owner, _AVERAGES) and hook == "on_train_end" and not _is_of(defined_in, "lightning_optim"):
        return f"of `{package_of(owner)}` writes its average into the module"
    loading: set[str] = set()
    for method in _code_of(type(owner), hook, set()):
        names = {node.attr for node in ast.walk(method) if isinstance(node, ast.Attribute)}
        if any(_is_off(owner, name) for name in names if "load" in name or "restore" in name):
            return ""
        loading.update(_loading_calls(method, owner))
    return f"calls `{min(loading)}`, perhaps to load weights into the module" if loading else ""


def _code_of(kind: type, method: str, seen: set[str]) -> Iterator[ast.FunctionDef]:
    """Yield the code of a method and of methods of the class that it uses, also by ``super()``."""
    seen.add(method)
    for defined in [vars(base)[method] for base in kind.__mro__ if method in vars(base)]:
        code = _parsed(inspect.unwrap(defined))
        if code is None:
            return
        yield code
        nodes = list(ast.walk(code))
        for name in [node.attr for node in nodes if isinstance(node, ast.Attribute)]:
            if name not in seen:
                yield from _code_of(kind, name, seen)
        if not any(isinstance(node, ast.Name) and node.id == "super" for node in nodes):
            return


def _parsed(function: Any) -> ast.FunctionDef | None:
    if not inspect.isfunction(function) or _is_of(function, *_NOT_READ):
        return None
    with suppress(OSError, SyntaxError, ValueError):  # without a source, the comparison at the end is left
        (code,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        return code if isinstance(code, ast.FunctionDef) else None
    return None


def _loading_calls(method: ast.FunctionDef, owner: Any) -> Iterator[str]:
    """Yield the names of functions with which a method loads weights into the module of the fit, or a part of it."""
    for call in ast.walk(method):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute | ast.Name):
            continue
        if isinstance(call.func, ast.Name):
            name, target = call.func.id, call.args[0] if call.args else None
        else:
            name, target = call.func.attr, call.func.value
        if name in _LOADING and target is not None and _is_module(ast.unparse(target), method, owner):
            yield name


def _is_module(target: str, method: ast.FunctionDef, owner: Any) -> bool:
    """Return True if an expression in a method is the module of the fit, or a part of it, as far as it shows.

    A callback may load weights into a model that it keeps itself, or into a copy: neither is an argument of its method.
    """
    root, *path = target.split(".")
    if isinstance(owner, LightningModule):
        with suppress(Exception):  # properties may raise anything
            return root == "self" and functools.reduce(getattr, path, owner) in list(owner.modules())
        return False
    if root.endswith("trainer"):
        return bool(path) and path[0] in ("lightning_module", "model", "strategy")
    return root in [argument.arg for argument in method.args.args[1:]]


def _is_off(owner: Any, name: str) -> bool:
    hparams = owner.hparams if isinstance(owner, LightningModule) else None
    with suppress(Exception):  # properties may raise anything
        return getattr(owner, name, None) is False or getattr(hparams, name, None) is False
    return False


def _is_of(defined: Any, *packages: str) -> bool:
    return (defined.__module__ or "").partition(".")[0] in packages  # code that was made by `exec` is in no module
