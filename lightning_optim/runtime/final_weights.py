"""Write the weights that the module holds after a fit, and say so where something else writes them too."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_optim.base import shards
from lightning_optim.base.norms import tensor_norms
from lightning_optim.runtime.lightning import (
    LightningModule,
    StochasticWeightAveraging,
    Trainer,
    WeightAveraging,
    rank_zero_warn,
)
from lightning_optim.runtime.lightning.packages import package_of
from lightning_optim.runtime.order import SessionCallback
from lightning_optim.runtime.refusals import hides_weights

_AVERAGES = (StochasticWeightAveraging, WeightAveraging)
_LOADING = {"load_state_dict", "load_model_state_dict", "set_model_state_dict"}
_NOT_READ = {"lightning", "lightning_fabric", "lightning_optim", "pytorch_lightning", "torch"}


class FinalWeights:
    """Let one callback write the weights that the module keeps, and tell of anything else that writes them.

    Packages bring callbacks that load the best weights when training ends, and modules do so too. What can be read off
    their code is told at the start. If nothing is, the parameters are compared before and after ``on_train_end``, over
    which callbacks of this package leave the weights of the last step in the module. That costs two norms of each
    parameter that is trained, at the end of the fit.

    Args:
        trainer: The Trainer of the fit.
        callbacks: The callbacks of this package in it.
    """

    def __init__(self, trainer: Trainer, callbacks: list[SessionCallback]) -> None:
        self._trainer, self._callbacks = trainer, callbacks
        self._norms: dict[str, tuple[Any, str]] = {}

    def start(self, patch: Callable[[Any, str, Any], None]) -> None:
        """Tell of what loads weights, or prepare to see it. Called at ``on_fit_start``, when all is set up.

        Args:
            patch: Sets an attribute for the length of the fit.
        """
        writer = next((callback for callback in self._by_rank() if callback.final_opt_out), None)
        if writer is None or hides_weights(self._trainer.strategy) or self._tell_of_others(writer):
            return
        loop, module = self._trainer.fit_loop, self._trainer.lightning_module
        run_end = loop.on_run_end

        def measure_and_end() -> None:
            self._norms = _norms(module, {name for name, one in module.named_parameters() if one.requires_grad})
            run_end()

        patch(loop, "on_run_end", measure_and_end)

    def write_(self, pl_module: LightningModule) -> bool:
        """Let one callback write the weights that the module keeps; return False if none has any to write.

        It is called at ``on_fit_end``, after the last checkpoint. Only one writes, so that no callback overwrites the
        weights of another. The callbacks are asked in the order of their ``final_rank``, until one has weights to
        write: the mean of checkpoints (0), the best weights that were validated (1), the average that is evaluated (2),
        an average that is not (3). If there are none, the module keeps its raw weights.
        """
        now = _norms(pl_module, self._norms) if self._norms else {}
        # Pruning that is made permanent replaces a parameter, a new dtype rounds it, and on another device its norm is
        # rounded in another way: none of these writes other weights.
        kept = [name for name, (identity, _) in self._norms.items() if name in now and now[name][0] == identity]
        was_written = any(now[name] != self._norms[name] for name in kept)
        writer = next((callback for callback in self._by_rank() if callback.write_final_(pl_module)), None)
        if writer is not None and was_written:
            rank_zero_warn(
                "A callback or the module wrote weights when training had ended, as in `on_train_end`, and"
                f" {type(writer).__name__} has written over them. {self._ways_out('those', 'what wrote them')}"
            )
        return writer is not None

    def _by_rank(self) -> list[SessionCallback]:
        ranked = [(callback.final_rank, callback) for callback in self._callbacks if callback.final_rank is not None]
        return [callback for _, callback in sorted(ranked, key=lambda pair: pair[0])]

    def _tell_of_others(self, ours: SessionCallback) -> bool:
        """Warn of callbacks, and of a module, whose code loads weights when training ends; return True if there are."""
        listed: list[Any] = [*self._trainer.callbacks, self._trainer.lightning_module]
        place = min(listed.index(one) for one in self._callbacks if one in listed)  # this one writes, for all
        name, told = type(ours).__name__, False
        for index, other in enumerate(listed):
            for hook in ("on_train_end", "on_fit_end"):
                if not (does := _writes_weights(other, hook)):
                    continue
                told, theirs = True, type(other).__name__
                when, lost = ("before", name) if hook == "on_fit_end" and index > place else ("after", theirs)
                rank_zero_warn(
                    f"`{theirs}.{hook}` {does}, and {name} writes the weights that the module ends with {when} it, so"
                    f" that those of {lost} are lost."
                    f" {self._ways_out(f'those of {theirs}', f'the loading of {theirs}')}"
                )
        return told

    def _ways_out(self, those: str, loading: str) -> str:
        opt_outs = " and ".join(callback.final_opt_out for callback in self._by_rank() if callback.final_opt_out)
        return f"To end with {those}, {opt_outs}; else turn off {loading}."


def _norms(pl_module: LightningModule, names: Container[str]) -> dict[str, tuple[Any, str]]:
    """Return identity and place of each parameter, and its norm; of a sharded one, that of this rank's shard."""
    shards.reshard_(pl_module)
    named = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if name in names
        and not is_lazy(parameter)
        and parameter.is_floating_point()
        and parameter.layout is torch.strided
    }
    norms = tensor_norms(shards.local_shards(parameter.detach() for parameter in named.values())).tolist()
    # As text, in which NaN equals NaN.
    return {
        name: ((id(one), one.dtype, one.device), repr(norm))
        for (name, one), norm in zip(named.items(), norms, strict=True)
    }


# ---- what can be read off the code of callbacks and modules ----------------------------------------------------------


def _writes_weights(owner: Any, hook: str) -> str:
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
