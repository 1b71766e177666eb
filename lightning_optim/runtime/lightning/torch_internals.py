"""Use what torch does not make public: trees of tensors, versions, weak keys, compiled modules, state dict versions."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.runtime.lightning.private_names import read_private

__all__ = [
    "WeakTensorKeyDictionary",
    "assert_in_graph",
    "is_compiled",
    "is_exporting",
    "is_transformed",
    "keep_versions",
    "set_state_metadata",
    "state_metadata",
    "structure_of",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "uncompiled",
]


@contextlib.contextmanager
def keep_versions(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context manager: writes to these tensors leave their version counters as they are.

    A graph that saved a tensor still runs backward if its values are put back before.
    """
    with contextlib.ExitStack() as stack:
        for tensor in tensors:
            stack.enter_context(torch.autograd._unsafe_preserve_version_counter(tensor))
        yield


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Check a condition where an exported program runs, since it does not branch on values."""
    torch._assert_async(condition, message)


def is_exporting() -> bool:
    """Return True if ``torch.export`` runs; before torch 2.7, whether torch compiles or exports."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def is_transformed() -> bool:
    """Return True in a transform of ``torch.func`` and in a mode that sees each operation, as that of ``make_fx``."""
    return torch._C._functorch.peek_interpreter_stack() is not None or is_in_torch_dispatch_mode()


def uncompiled(module: Any) -> Any:
    """Return the module of which ``torch.compile(module)`` made this one; any other module as it is."""
    return read_private(module, "_orig_mod") if isinstance(module, torch._dynamo.OptimizedModule) else module


def is_compiled(module: nn.Module) -> bool:
    """Return True if a module was compiled, by ``torch.compile(module)`` or by ``module.compile()``."""
    return uncompiled(module) is not module or read_private(module, "_compiled_call_impl") is not None


def structure_of(output: Any) -> Any:
    """Return the structure of an output without its leaves; two that are equal have their leaves in the same places.

    Named tuples are equal if their fields are: their class may be made at run time, by each model anew.
    """
    leaves, structure = tree_flatten(output, is_leaf=_is_named_tuple)
    return structure, [(leaf._fields, structure_of(tuple(leaf))) if _is_named_tuple(leaf) else None for leaf in leaves]


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def state_metadata(state: Any) -> dict[str, Any] | None:
    """Return the versions of the modules in a ``state_dict()``, by prefix; ``None`` for another dictionary."""
    return getattr(state, "_metadata", None)


def set_state_metadata(state: OrderedDict[str, Any], metadata: dict[str, Any]) -> None:
    """Attach the versions of modules to a state dict."""
    state._metadata = metadata  # type: ignore[attr-defined]
