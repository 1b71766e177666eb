"""Each private name stands in one function of the wall, in its table, and has a canary that bites."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import pickletools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.utils import parametrizations, prune

import lightning_optim
from lightning_optim.runtime.files import sharded_reading
from lightning_optim.runtime.lightning import private_names
from lightning_optim.runtime.lightning.private_names import PRIVATE_NAMES, entry_of
from tests.lightning import EarlyStopping, LightningModule
from tests.runtime.lightning import (
    test_canaries_data_loading,
    test_canaries_logging,
    test_canaries_loops,
    test_canaries_modules,
    test_canaries_strategies,
    test_canaries_torch,
)
from tests.runtime.lightning.canaries import CANARIES, Model, fit

ROOT = Path(lightning_optim.__file__).parent
WALL = ROOT / "runtime" / "lightning"
_MODULES = (
    test_canaries_data_loading,
    test_canaries_logging,
    test_canaries_loops,
    test_canaries_modules,
    test_canaries_strategies,
    test_canaries_torch,
)  # which register their canaries when they are imported


_OF_NAMED_TUPLES = {"_fields", "_replace", "_asdict", "_make"}  # public: they start with "_" to be no name of a field


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name)) and name not in _OF_NAMED_TUPLES


def names_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the private names that a piece of code uses and does not define: attributes, imports, and texts."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr, line
        elif isinstance(node, ast.ImportFrom):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((part, line) for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            yield from ((part, line) for alias in node.names for part in alias.name.split(".") if is_private(part))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            yield node.value, line


def defined_in(tree: ast.AST) -> set[str]:
    """Return the private names that a file gives to functions, classes, variables, arguments and its own attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.keyword | ast.arg):
            found |= {node.arg} if node.arg else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            found.add(ast.literal_eval(node.args[1]))
    return found


# ---- the wall --------------------------------------------------------------------------------------------------------

_FILES = {path.stem: ast.parse(path.read_text()) for path in WALL.glob("*.py") if path.stem != "private_names"}


def test_the_table_holds_the_names_that_the_wall_uses() -> None:
    used = {name for tree in _FILES.values() for name, _ in names_in(tree) if name not in defined_in(tree)}
    assert used == {entry.name for entry in PRIVATE_NAMES}
    assert len(PRIVATE_NAMES) == len({entry.name for entry in PRIVATE_NAMES})


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_each_name_stands_in_one_file_and_its_function(entry: private_names.PrivateName) -> None:
    module, function = entry.used_in.split(".")
    assert [stem for stem, tree in _FILES.items() if entry.name in {name for name, _ in names_in(tree)}] == [module]
    tree = _FILES[module]
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }  # type: ignore[attr-defined]
    assert function in defined | imported


def test_each_name_has_a_canary() -> None:
    assert CANARIES.keys() == {entry.name for entry in PRIVATE_NAMES}
    assert all(hasattr(module, "canary") for module in _MODULES)


# ---- canaries bite ---------------------------------------------------------------------------------------------------


def _hide(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let the wall find no attribute of this name, as if a new version had renamed it."""

    def has(owner: Any, attribute: str) -> bool:
        return attribute != name and hasattr(owner, attribute)

    patch.setattr(private_names, "hasattr", has, raising=False)


def _rename_hparams(patch: pytest.MonkeyPatch) -> None:
    def set_attribute(self: Any, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, "_renamed" if name == "_hparams_name" else name, value)

    patch.setattr(LightningModule, "__setattr__", set_attribute, raising=False)


def _rename_vectors(patch: pytest.MonkeyPatch, old: str) -> None:
    register = nn.Module.register_buffer

    def renamed(self: Any, name: str, *args: Any, **options: Any) -> None:
        register(self, "renamed" if name == old else name, *args, **options)

    patch.setattr(nn.Module, "register_buffer", renamed)


def _not_scaling(patch: pytest.MonkeyPatch) -> None:
    init = torch.optim.AdamW.__init__

    def without(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        vars(self).pop("_step_supports_amp_scaling", None)

    patch.setattr(torch.optim.AdamW, "__init__", without)


_OTHER_MUTATIONS: dict[str, Any] = {
    "_hparams_name": _rename_hparams,
    "_instantiator": lambda patch: patch.setattr(f"{WALL_NAME}.loading._CALLED", "renamed"),
    "_u": lambda patch: _rename_vectors(patch, "_u"),
    "_v": lambda patch: _rename_vectors(patch, "_v"),
    "_step_supports_amp_scaling": _not_scaling,
    "_SpectralNorm": lambda patch: patch.setattr(f"{WALL_NAME}.spectral_norm._SpectralNorm", nn.Linear),
    "_MultiProcessingLauncher": lambda patch: patch.setattr(f"{WALL_NAME}.strategies.found", lambda *names: ()),
    "_unsafe_preserve_version_counter": lambda patch: patch.delattr(torch.autograd, "_unsafe_preserve_version_counter"),
    "_assert_async": lambda patch: patch.delattr(torch, "_assert_async"),
    "_dynamo": lambda patch: patch.delattr(torch._dynamo, "OptimizedModule"),
    "_C": lambda patch: patch.setattr(torch._C._functorch, "peek_interpreter_stack", lambda: None),
    "_functorch": lambda patch: patch.delattr(torch._C._functorch, "peek_interpreter_stack"),
    "_python_dispatch": lambda patch: patch.setattr(
        f"{WALL_NAME}.torch_internals.is_in_torch_dispatch_mode", lambda: False
    ),
    "_metadata": lambda patch: patch.setattr(f"{WALL_NAME}.torch_internals.getattr", lambda *args: None, raising=False),
    "_pytree": lambda patch: patch.setattr(f"{WALL_NAME}.torch_internals.tree_leaves", list),
}
WALL_NAME = "lightning_optim.runtime.lightning"


@pytest.mark.parametrize("name", sorted(CANARIES))
def test_a_canary_bites_when_its_name_is_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        if name in _OTHER_MUTATIONS:
            _OTHER_MUTATIONS[name](patch)
        else:
            _hide(patch, name)
        with pytest.raises(
            AssertionError, match=rf"`{name}` is gone, or means something else, in (pytorch_)?lightning \d"
        ) as info:
            CANARIES[name]()
    module, function = entry_of(name).used_in.split(".")
    said = str(info.value)
    assert f"`{function}` in lightning_optim/runtime/lightning/{module}.py needs it to {entry_of(name).purpose}" in said


def test_a_name_that_is_gone_is_neither_read_nor_written_in_silence() -> None:
    owner: Any = nn.Module()
    for call in (
        lambda: private_names.read_private(owner, "_skip_next_val"),
        lambda: private_names.write_private(owner, "_skip_next_val", True),
    ):
        with pytest.raises(RuntimeError, match=r"^Module has no such attribute: `_skip_next_val` is gone.*function\.$"):
            call()
    assert "_skip_next_val" not in vars(owner)


# ---- outside of the wall ---------------------------------------------------------------------------------------------

_ELSEWHERE = {
    # What policies need too, which import torch alone: each has a test in tests/base.
    "base/module_registry.py": {
        "_modules",
        "_parameters",
        "_buffers",
        "_non_persistent_buffers_set",
        "_forward_pre_hooks",
    },
    "base/recurrent_weights.py": {"_flat_weights", "_update_flat_weights"},
    "base/layer_classes.py": {"_BatchNorm", "_NormBase", "_DropoutNd"},
    "base/shards.py": {"_version"},
    # Names in the pickles of distributed checkpoints.
    "runtime/files/sharded_reading.py": {"_StorageInfo", "_MEM_FORMAT_ENCODING", "_get_layout"},
    # Methods of Lightning's class that a subclass may override here too, or is told that it may not.
    "stopping/early_stopping.py": {
        "_check_on_train_epoch_end",
        "_evaluate_stopping_criteria",
        "_log_info",
        "_run_early_stopping_check",
        "_should_skip_check",
        "_validate_condition_metric",
    },
    # Ends of the names of parameters and buffers in a state dict, and a class of torch that is looked up by its name.
    "averaging/training/buffer_plan.py": {"_mask", "_Orthogonal"},
    "averaging/training/pruned_parameters.py": {"_orig", "_mask"},
    "averaging/training/spectral_norm_vectors.py": {"_orig", "_u", "_v"},
    "averaging/checkpoints/reading.py": {"_extra_state"},
    "stopping/best_weights.py": {"_orig", "_mask"},
}
_FOREACH = re.compile(r"_foreach_[a-z_]+")  # torch's kernels for lists of tensors

_CODE = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for path in sorted(ROOT.rglob("*.py"))
    if WALL not in path.parents
}
_OWN = set().union(*map(defined_in, _CODE.values()))
_FOREIGN = {entry.name for entry in PRIVATE_NAMES} | set().union(*_ELSEWHERE.values())


def strangers_in(path: str) -> set[str]:
    """Return the private names that a file uses and neither defines nor finds in another file of the package."""
    tree = _CODE[path]
    defined = defined_in(tree)
    found = {name for name, _ in names_in(tree) if name not in defined and (name not in _OWN or name in _FOREIGN)}
    return {name for name in found if not _FOREACH.fullmatch(name) and "lightning_optim" not in name} | _inherited(
        path, tree
    )


def _inherited(path: str, tree: ast.AST) -> set[str]:
    """Return the private names of Lightning's, torch's and torchmetrics' classes that ours use, define or override."""
    module = importlib.import_module(
        ("lightning_optim." + path.removesuffix(".py").replace("/", ".")).removesuffix(".__init__")
    )
    found = set()
    for node in ast.walk(tree):
        kind = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
        if isinstance(node, ast.ClassDef) and isinstance(kind, type):
            used = {name.attr for name in ast.walk(node) if isinstance(name, ast.Attribute) and _of_self(name)}
            used |= {method.name for method in ast.walk(node) if isinstance(method, ast.FunctionDef)}
            found |= {name for name in used if is_private(name)} & _names_of_bases(kind)
    return found


def _of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _names_of_bases(kind: type) -> set[str]:
    found: set[str] = set()
    for base in kind.__mro__:
        # Of a class in torch or Python nothing is overridden by accident but what its methods store.
        if base.__module__.startswith("lightning_optim") or base is object:
            continue
        found |= {name for name in vars(base) if is_private(name)}
        with contextlib.suppress(OSError, TypeError):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _of_self(node)}
    return found


@pytest.mark.parametrize("path", _CODE)
def test_private_names_stand_in_the_wall(path: str) -> None:
    strangers = strangers_in(path) - _ELSEWHERE.get(path, set())
    assert not strangers, (
        f"lightning_optim/{path} uses the private names {sorted(strangers)}: give each a function in"
        " lightning_optim/runtime/lightning/, a line in its table, and a canary"
    )


@pytest.mark.parametrize("path", _ELSEWHERE)
def test_the_exceptions_are_in_use(path: str) -> None:
    assert _ELSEWHERE[path] == strangers_in(path)


@pytest.mark.parametrize(
    "line",
    [
        "x._combined_loader",
        "x._buffers = {}",
        "getattr(x, '_data_fetcher', None)",
        "patched(x, '_results', 1)",
        "from torch.utils._pytree import tree_map",
        "from lightning.pytorch.loops.utilities import _no_grad_context",
        "import torch._dynamo",
        "x.y[0]._skip_next_val -= 1",
        "vars(x)['_iterator'] = None",
    ],
)
def test_each_way_to_use_a_private_name_is_found(line: str) -> None:
    assert {name for name, _ in names_in(ast.parse(line))}


def test_lightning_calls_what_a_subclass_of_early_stopping_overrides() -> None:
    """The methods that our class keeps for subclasses of Lightning's are those that Lightning's hooks call."""
    calls = []

    class Recording(EarlyStopping):
        def _should_skip_check(self, trainer: Any) -> bool:
            calls.append("_should_skip_check")
            return super()._should_skip_check(trainer)

        def _run_early_stopping_check(self, trainer: Any) -> None:
            calls.append("_run_early_stopping_check")
            super()._run_early_stopping_check(trainer)

        def _validate_condition_metric(self, logs: Any) -> bool:
            calls.append("_validate_condition_metric")
            return super()._validate_condition_metric(logs)

        def _evaluate_stopping_criteria(self, current: Any) -> Any:
            calls.append("_evaluate_stopping_criteria")
            return super()._evaluate_stopping_criteria(current)

        def _log_info(self, *args: Any) -> None:
            calls.append("_log_info")

    stop = Recording("value", patience=1, verbose=True, check_on_train_epoch_end=True)
    assert stop._check_on_train_epoch_end is True
    fit(Model(on_epoch=True), stop, max_epochs=2)
    assert set(calls) == _ELSEWHERE["stopping/early_stopping.py"] - {"_check_on_train_epoch_end"}


class WithExtraState(nn.Module):
    def get_extra_state(self) -> int:
        return 3


def test_names_in_state_dicts_are_those_of_torch() -> None:
    """Names that the exceptions hold as text, which torch gives to what a ``state_dict`` holds, and one class."""
    pruned = nn.Linear(2, 2)
    prune.random_unstructured(pruned, "weight", 1)  # type: ignore[no-untyped-call]
    normed = torch.nn.utils.spectral_norm(nn.Linear(2, 2))
    orthogonal = parametrizations.orthogonal(nn.Linear(2, 2))
    said = f"torch {torch.__version__} has renamed it: see `_ELSEWHERE` for the files that know it by its old name"
    assert {"weight_orig", "weight_mask"} <= pruned.state_dict().keys(), said
    assert {"weight_orig", "weight_u", "weight_v"} <= normed.state_dict().keys(), said
    assert WithExtraState().state_dict() == {"_extra_state": 3}, said
    (part,) = orthogonal.parametrizations.weight
    assert type(part) is getattr(parametrizations, "_Orthogonal", None) and "base" in dict(part.named_buffers()), said


def test_the_metadata_of_torch_names_what_the_reader_knows(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    read = sharded_reading.reader_of(tmp_path, weights_only=True).read_metadata()
    assert list(read.state_dict_metadata) == ["weight"]
    named = {argument for _, argument, _ in pickletools.genops((tmp_path / ".metadata").read_bytes()) if argument}
    assert _ELSEWHERE["runtime/files/sharded_reading.py"] <= {str(name) for name in named}
