"""Replace one call of a model by the mean of that call over all members of an ensemble."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_optim.base.dtypes import has_mean
from lightning_optim.base.module_registry import with_submodules
from lightning_optim.base.suggestions import nearest, shown
from lightning_optim.ensembling.mean_prediction import Outputs, mean_prediction
from lightning_optim.ensembling.probability_check import why_no_probabilities
from lightning_optim.runtime.lightning import MisconfigurationException
from lightning_optim.runtime.lightning.torch_internals import is_compiled, is_transformed, tree_map_only

_MEANINGS: dict[Outputs, str] = {
    "values": "for regression: averaged as they are",
    "logits": "of classes that exclude each other, before the softmax",
    "binary_logits": "one decision per element, before the sigmoid",
    "probabilities": "after a softmax or a sigmoid",
}

_Call = TypeVar("_Call", bound=Callable[..., Any])


def without_gradients(call: _Call) -> _Call:
    """Decorate a function so that it runs without gradients and its result needs none.

    An exported program cannot be saved if one ``no_grad`` is nested in another, and a member may have its own. While
    torch compiles or exports, the function therefore runs as it is, and its result is detached.
    """

    @functools.wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return tree_map_only(Tensor, Tensor.detach, call(*args, **kwargs))
        with torch.no_grad():
            return call(*args, **kwargs)

    return called  # type: ignore[return-value]


class CombinedCall(nn.Module):
    """Replace the submodule ``on``: call that submodule of every member and return the mean prediction.

    Only the name ``on`` leads here. Everything else that a step finds on ``self`` is the first member's.

    Args:
        members: All members. They are not registered here: the ensemble holds them, and each weight has one name.
        outputs: Kind of the call's output.
        on: The submodule whose call is combined; ``None`` for the member's own ``forward``.
        dim: The dimension of the classes, for logits.

    Attributes:
        active: Indices of the members that take part.
        calls: Number of calls so far.
    """

    def __init__(self, members: nn.ModuleList, outputs: Outputs, on: str | None, dim: int | None) -> None:
        super().__init__()
        object.__setattr__(self, "_members", members)
        self.outputs, self.on, self.dim = outputs, on, dim
        self.active: Sequence[int] = range(len(members))
        self.calls = 0
        self._checked: set[int] = set()  # members whose first output has been checked
        self._running = False
        self._expected = False
        self.eval()

    @without_gradients
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mean of the members' outputs for these arguments."""
        self.calls += 1
        self._running = True
        try:
            return mean_prediction(self.member_outputs(*args, **kwargs), self.outputs, self.dim)
        finally:
            self._running = False

    def member_outputs(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Yield the output of each active member, one after the other."""
        return (self._output(index, *args, **kwargs) for index in self.active)

    def _output(self, index: int, *args: Any, **kwargs: Any) -> Any:
        output = self.callee(index)(*args, **kwargs)
        if self.outputs == "probabilities" and not _is_traced():
            self._check_probabilities(output, index)
        return output

    def _check_probabilities(self, output: Any, index: int) -> None:
        """Raise if the first output of a member holds no probabilities: a check of each would wait for the device."""
        if index in self._checked or not has_mean(output) or output.is_complex() or output.is_meta:
            return
        if why := why_no_probabilities(output):
            raise ValueError(
                f'`outputs="probabilities"` is not what member {index} returns: its values {why}. Set'
                ' `outputs="logits"` for values before a softmax, or `outputs="binary_logits"` for values before a'
                " sigmoid."
            )
        self._checked.add(index)

    def callee(self, index: int) -> Callable[..., Any]:
        """Return the module to call in a member. Looked up at each call: sharding and compilation replace submodules.

        Args:
            index: The member's index.
        """
        member = self._members[index]
        return member if self.on is None else member.get_submodule(self.on)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_members" not in self.__dict__ or self.on is None:
                raise
        value = getattr(self.callee(0), name)
        if isinstance(value, Tensor | nn.Module) or callable(value):
            raise AttributeError(
                f"`self.{self.on}.{name}` would be the first member's alone: an ensemble combines the call"
                f" `self.{self.on}(…)` and nothing inside it. Set `on` to the submodule that is called, perhaps"
                f" `on={self.on + '.' + name!r}`"
            )
        return value

    @contextmanager
    def expected_in(self, caller: str) -> Iterator[None]:
        """Context manager: raise at its end if no combined call was made in it; of nested ones, only the outermost.

        Args:
            caller: The method that runs in the context, for the message.

        Raises:
            MisconfigurationException: If the combined call was never made.
        """
        before, nested = self.calls, self._expected
        self._expected = True
        try:
            yield
        finally:
            self._expected = nested
        if self.calls == before and not nested:
            called = "self(…)" if self.on is None else f"self.{self.on}(…)"
            names = [name for name, _ in self._members[0].named_children()]
            raise MisconfigurationException(
                f"`{caller}` never reached `{called}`, the call that the Ensemble combines (`on={self.on!r}`), so its"
                f" values are those of one member. Set `on` to the submodule that is called there, one of {names} or"
                ' inside one, such as "model.net"; or to None if the step calls `self(…)`.'
            )

    @contextmanager
    def layers_outside(self) -> Iterator[set[str]]:
        """Context manager: collect the names of the first member's layers that are called outside of the combined call.

        The output of such a layer is one member's, not a mean. Layers that all members share, and metrics, are not
        collected.
        """
        first, *others = self._members
        outside: set[str] = set()
        if any(map(is_compiled, first.modules())):
            yield outside  # hooks would cause compiled modules to be compiled again
            return
        shared = {id(module) for other in others for module in other.modules()}
        metrics = {id(part) for metric in first.modules() if isinstance(metric, Metric) for part in metric.modules()}

        def collect(module: nn.Module, _: Any) -> None:
            if not self._running:
                outside.add(names[module])

        names = {module: name or type(module).__name__ for name, module in first.named_modules()}
        layers = (module for module in names if any(True for _ in module.parameters(recurse=False)))
        watched = (module for module in layers if id(module) not in shared | metrics)
        handles = [module.register_forward_pre_hook(collect) for module in watched]
        try:
            yield outside
        finally:
            for handle in handles:
                handle.remove()


def _is_traced() -> bool:
    """Return True if torch compiles, exports, traces or transforms, where nothing can depend on values."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return True
    return is_transformed()


def has_submodule(module: nn.Module, path: str) -> bool:
    """Return True if the module has a submodule of this name."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def missing_submodule(member: nn.Module, index: int, on: str) -> ValueError:
    """Make the error for an ``on`` that a member does not have, with the nearest name that it has."""
    names = [name for name, _ in member.named_modules() if name]
    return ValueError(
        f"`on={on!r}` must name a submodule of each member, and is no submodule of member {index}, a"
        f" {type(member).__name__}{nearest(on, names) or '.'} Its submodules: {shown(names)}"
    )


def with_replacement(module: nn.Module, path: str, new: nn.Module) -> dict[str, nn.Module]:
    """Return the child of ``module`` that leads to ``path``, by its name, with ``new`` in place of ``path``.

    The modules on the way are shallow copies, so ``module`` itself is not changed.
    """
    head, _, rest = path.partition(".")
    if not rest:
        return {head: new}
    child = module.get_submodule(head)
    return {head: with_submodules(child, with_replacement(child, rest, new))}


def check_arguments(outputs: Any, on: Any, dim: Any) -> None:
    """Raise if an argument of an ensemble is not allowed."""
    if not isinstance(outputs, str) or outputs not in get_args(Outputs):
        meant = ", ".join(f"{name!r} ({meaning})" for name, meaning in _MEANINGS.items())
        raise ValueError(
            f"`outputs` must be one of {meant}; it is never guessed, since each kind is averaged in its own way; got"
            f" {outputs!r}"
        )
    if on is not None and (not isinstance(on, str) or not on):
        raise ValueError(f"`on` must be the name of a submodule, or None for the members' own forward, got {on!r}")
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or outputs != "logits"):
        raise ValueError(
            f'`dim` must be an integer, the dimension of the classes, with `outputs="logits"`, got {dim!r}'
        )
