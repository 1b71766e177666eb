"""Give callbacks the loss of each micro-batch at the start of its backward pass, and the gradient arriving at it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.order import SessionCallback

LossHandler: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]
"""Takes the loss, detached, and the gradient that arrives at it. Returns a factor for that gradient, or ``None``."""


class LossGradients:
    r"""Call functions in each backward pass with the loss as the user computed it, and the gradient that arrives at it.

    Accumulation, a weighted window and a loss scale multiply the loss before the backward pass; the gradient that
    arrives at the user's own tensor is the product of their factors. So a function compares the loss itself with a
    number, and whatever it adds to other gradients, times the arriving one, is weighted as the loss is.

    The loss is the result of ``training_step`` under automatic optimization, the argument of ``manual_backward`` under
    manual optimization, and that of ``optimize`` with ``ManualOptimizationMixin``. A hook on the tensor calls the
    functions, before the rest of the backward pass. All of them get the gradient as it arrives; then their factors are
    applied. So the order of the callbacks changes nothing.

    Args:
        trainer: The Trainer that runs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._handlers: list[tuple[SessionCallback, LossHandler]] = []
        self._hook: RemovableHandle | None = None

    def add(self, callback: SessionCallback, handler: LossHandler, replace: Callable[[Any, str, Any], None]) -> None:
        """Call ``handler`` in each backward pass while ``callback`` is in the Trainer's list.

        Args:
            callback: The callback to which the function belongs.
            handler: The function.
            replace: Sets an attribute of an object for the length of the fit.
        """
        if not self._handlers:
            strategy = self.trainer.strategy
            replace(strategy, "training_step", self._watching_step(strategy.training_step))
            replace(strategy, "backward", self._watching_backward(strategy.backward))
        self._handlers.append((callback, handler))

    @contextlib.contextmanager
    def of(self, loss: Tensor) -> Iterator[None]:
        """Context manager: the loss of the backward pass in it is ``loss``, whatever it is multiplied by."""
        outer = self._hook is not None
        if not outer:
            self._watch(loss)
        try:
            yield
        finally:
            if not outer:
                self._unwatch()

    def _watching_step(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``strategy.training_step``: its result is the loss under automatic optimization."""

        def step(*args: Any, **kwargs: Any) -> Any:
            output = training_step(*args, **kwargs)
            if self.trainer.lightning_module.automatic_optimization:
                loss = loss_in(output)
                self._unwatch()
                if isinstance(loss, Tensor):
                    self._watch(loss)
            return output

        return step

    def _watching_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``strategy.backward``: its argument is the loss under manual optimization, if no other was named."""

        def watched(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.trainer.lightning_module.automatic_optimization:
                with self.of(loss):
                    return backward(loss, *args, **kwargs)
            try:
                return backward(loss, *args, **kwargs)
            finally:
                self._unwatch()

        return watched

    def _watch(self, loss: Tensor) -> None:
        if loss.requires_grad and self._handlers:
            value = loss.detach()  # the hook would keep the graph alive
            self._hook = loss.register_hook(lambda grad: self._arrived(value, grad))  # type: ignore[no-untyped-call]

    def _unwatch(self) -> None:
        """Remove the hook: with ``retain_graph=True`` a loss may run backward twice."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _arrived(self, loss: Tensor, grad: Tensor) -> Tensor:
        acting = self.trainer.callbacks
        factors = [handler(loss, grad) for callback, handler in self._handlers if callback in acting]
        for factor in factors:
            if factor is not None:
                grad = grad * factor.to(grad.dtype)
        return grad


def loss_in(output: Any) -> Any:
    """Return the loss in a result of ``training_step`` under automatic optimization, which may be a dictionary."""
    return output.get("loss") if isinstance(output, Mapping) else output
