"""The call that an ensemble combines, and what may be combined."""

from __future__ import annotations

import difflib
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lightning_optim.base.module_registry import with_submodules
from lightning_optim.ensembling.mean_prediction import Outputs, mean_prediction
from lightning_optim.runtime.lightning import LightningModule, to_uncompiled

_NAMES = ("members", "member_outputs", "from_checkpoints")  # what an ensemble has beside a member's own
_OUTPUTS = {
    "values": "for regression: averaged as they are",
    "logits": "of classes that exclude each other, before the softmax",
    "binary_logits": "one decision in each element, before the sigmoid",
    "probabilities": "after a softmax or a sigmoid",
}

_Call = TypeVar("_Call", bound=Callable[..., Any])


def gradient_free(call: _Call) -> _Call:
    """Call without gradients; the result needs none.

    An exported program cannot be saved where one ``no_grad`` lies within another, and a member may have its own. So
    what torch compiles or exports runs as it is, and its result is detached.
    """

    @functools.wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return tree_map_only(Tensor, Tensor.detach, call(*args, **kwargs))
        with torch.no_grad():
            return call(*args, **kwargs)

    return called  # type: ignore[return-value]


class CombinedCall(nn.Module):
    """Stands where a member has the submodule ``on``: calls that of each member, and returns the mean prediction.

    Args:
        members: All members. They are not registered here: the ensemble holds them, and each weight has one name.
        outputs: What the call returns.
        on: The submodule whose call is combined; ``None`` for the member's own.
        dim: The dimension of the classes, for logits.

    Attributes:
        active: The indices of the members that take part.
        calls: How often it was called.
        inside: Whether something runs now that must call it.
    """

    def __init__(self, members: nn.ModuleList, outputs: Outputs, on: str | None, dim: int | None) -> None:
        super().__init__()
        object.__setattr__(self, "_members", members)
        self.outputs, self.on, self.dim = outputs, on, dim
        self.active: Sequence[int] = range(len(members))
        self.calls = 0
        self.inside = False
        self._running = False
        self.eval()

    @gradient_free
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The mean of what the members return for these arguments."""
        self.calls += 1
        self._running = True
        try:
            return mean_prediction(self.each(*args, **kwargs), self.outputs, self.dim)
        finally:
            self._running = False

    def each(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """What each member returns, one after the other."""
        return (self.called(index)(*args, **kwargs) for index in self.active)

    def called(self, index: int) -> Callable[..., Any]:
        """What is called of a member. Looked up at each call: sharding and compilation replace submodules."""
        member = self._members[index]
        return member if self.on is None else member.get_submodule(self.on)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_members" not in self.__dict__ or self.on is None:
                raise
        value = getattr(self.called(0), name)
        if isinstance(value, Tensor | nn.Module) or callable(value):
            raise AttributeError(
                f"`self.{self.on}.{name}` would be the first member's alone: an ensemble combines the call"
                f" `self.{self.on}(…)` and nothing inside. Set `on` to what is called, perhaps"
                f" `on={self.on + '.' + name!r}`"
            )
        return value

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        """Gather the names of the first member's layers that are called outside of the combined call.

        Their weights are those of one member, and their output is no mean. What all members share is not gathered, nor
        are metrics.
        """
        first, *others = self._members
        strays: set[str] = set()
        if any("_orig_mod" in module._modules or module._compiled_call_impl for module in first.modules()):
            yield strays  # hooks would have compiled modules compiled again
            return
        shared = {id(module) for other in others for module in other.modules()}
        metrics = {id(part) for metric in first.modules() if isinstance(metric, Metric) for part in metric.modules()}

        def look(module: nn.Module, _: Any) -> None:
            if not self._running:
                strays.add(names[module])

        names = {module: name or type(module).__name__ for name, module in first.named_modules()}
        own = (module for module in names if any(True for _ in module.parameters(recurse=False)))
        watched = (module for module in own if id(module) not in shared | metrics)
        handles = [module.register_forward_pre_hook(look) for module in watched]
        try:
            yield strays
        finally:
            for handle in handles:
                handle.remove()


def has_submodule(module: nn.Module, path: str) -> bool:
    """Whether the module has a submodule of this name."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def no_submodule(member: nn.Module, index: int, on: str) -> ValueError:
    """The error of an ``on`` that a member does not have, with the names that come near."""
    names = [name for name, _ in member.named_modules() if name]
    near = difflib.get_close_matches(on, names, n=3, cutoff=0.3) or names[:3]
    return ValueError(f"`on={on!r}` is no submodule of member {index}, a {type(member).__name__}; near: {near}")


def replaced(module: nn.Module, path: str, new: nn.Module) -> dict[str, nn.Module]:
    """The child of ``module`` on the way to ``path``, by its name, with ``new`` at the end of the way.

    Modules on the way are copies that share everything else: the member itself keeps what it has.
    """
    head, _, rest = path.partition(".")
    if not rest:
        return {head: new}
    child = module.get_submodule(head)
    return {head: with_submodules(child, replaced(child, rest, new))}


def checked_members(members: Any) -> list[LightningModule]:
    """The members as a list, if an ensemble can be made of them."""
    given = [] if isinstance(members, nn.Module | str) or not isinstance(members, Iterable) else list(members)
    given = [getattr(member, "_orig_mod", member) for member in given]  # of `torch.compile(member)`
    if not given:
        raise ValueError(f"`members` is a list of at least one LightningModule, got {type(members).__name__}")
    for member in given:
        if not isinstance(member, LightningModule):
            raise ValueError(f"`members` are LightningModules, got a {type(member).__name__}")
        if isinstance(member.__dict__.get("_combined"), CombinedCall):
            raise ValueError(
                f"`members` are LightningModules, and no Ensembles, got a {type(member).__name__}: give the members of"
                " all of them, `[*one.members, *other.members]`"
            )
        if any(isinstance(module, FSDPModule) for module in member.modules()):
            raise ValueError(
                f"`members` are given whole, and this {type(member).__name__} is sharded: make it anew, load its"
                " weights, and let `configure_model` shard it in the Trainer that evaluates the ensemble"
            )
    if taken := [name for name in _NAMES if hasattr(given[0], name)]:
        raise ValueError(f"`members`: {type(given[0]).__name__} has {taken}, which an Ensemble needs: rename it")
    return given


def undo_compilation_(member: LightningModule) -> None:
    """Give a member back the methods that a fit of ``torch.compile(member)`` replaced.

    Those that Lightning left on the instance would call the module that was fitted, and of a copy not the copy.
    """
    if member._compiler_ctx is None:
        return
    to_uncompiled(member)
    for name, method in list(vars(member).items()):
        if isinstance(method, types.MethodType) and method.__func__ is getattr(type(member), name, None):
            del member.__dict__[name]


def check_arguments(outputs: Any, on: Any, dim: Any) -> None:
    """Raise if an argument of an ensemble is not allowed."""
    if not isinstance(outputs, str) or outputs not in _OUTPUTS:
        meant = ", ".join(f"{name!r} ({meaning})" for name, meaning in _OUTPUTS.items())
        raise ValueError(
            f"`outputs` is one of {meant}, and is never guessed, since each has another mean; got {outputs!r}"
        )
    if on is not None and (not isinstance(on, str) or not on):
        raise ValueError(f"`on` is the name of a submodule, or None for the members' own forward, got {on!r}")
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or outputs != "logits"):
        raise ValueError(f'`dim` is the dimension of the classes, an integer, with `outputs="logits"`, got {dim!r}')
