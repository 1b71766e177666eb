"""Accumulate and step in manual optimization: backward pass, window, step and ``zero_grad`` in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.base.dtypes import accumulation_dtype
from lightning_optim.gradients.accumulation_window import Window
from lightning_optim.runtime.lightning import (
    LightningOptimizer,
    MisconfigurationException,
    ModuleMixin,
    Trainer,
    rank_zero_warn,
)
from lightning_optim.runtime.lightning.precision import scaler_of
from lightning_optim.runtime.lightning.strategies import without_reduction
from lightning_optim.runtime.order import AccumulationWindows
from lightning_optim.runtime.refusals import hides_weights
from lightning_optim.runtime.session import Session
from lightning_optim.runtime.step import parameters_of


class ManualOptimizationMixin(ModuleMixin):
    """Accumulate, clip and average in manual optimization as in automatic optimization, with ``self.optimize``.

    ``self.optimize(loss, optimizer)`` does the backward pass, the accumulation window, the step and ``zero_grad``; a
    module with one optimizer may leave it out. It
    takes the size of the window from :class:`GradientAccumulation` if that is among the callbacks, and otherwise steps
    at each call. Each optimizer has its own window, which closes at the last batch of the epoch; the window of an
    optimizer that is not called in that batch stays open into the next epoch. Clipping, penalties and averages are
    those of the callbacks.

    The backward pass writes the gradients of this optimizer's parameters only. The loss of a GAN's generator also
    reaches the discriminator; its gradients there would otherwise be added to the discriminator's window.

    Example::

        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> class GAN(ManualOptimizationMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.automatic_optimization = False
        ...         self.generator, self.discriminator = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         generator, discriminator = self.optimizers()
        ...         fake = self.generator(torch.randn_like(batch))
        ...         self.optimize(-self.discriminator(fake).mean(), generator)
        ...         self.optimize((self.discriminator(fake.detach()) - self.discriminator(batch)).mean(), discriminator)
        ...     def configure_optimizers(self):
        ...         return [torch.optim.SGD(net.parameters(), 0.1) for net in (self.generator, self.discriminator)]
    """

    def optimize(self, loss: Tensor, optimizer: Optimizer | LightningOptimizer | None = None) -> None:
        """Add the gradient of ``loss`` to the optimizer's window; step when it is full, or at the epoch's last batch.

        Args:
            loss: A scalar, the mean over the micro-batch.
            optimizer: One of ``self.optimizers()``. May be left out if there is only one.

        Raises:
            TypeError: If ``loss`` is not a tensor, as when the two are swapped.
            ValueError: If ``loss`` is not a scalar or has no gradient; if ``optimizer`` is not one of the module's, or
                is left out although there are several.
            MisconfigurationException: If the gradients of an open window are gone, as after a ``zero_grad`` of your
                own; or if a step has no gradient under a GradScaler, which takes no such step.

        Warns once, at the end of the first epoch, of an optimizer that had a gradient in none of its steps.
        """
        trainer = self.trainer
        _check_loss(loss)
        wrapped = _wrapped(trainer, optimizer)
        plain = wrapped.optimizer
        session, given = Session.find(trainer), loss
        windows = _open_windows(trainer)
        index = -1 if windows is None else trainer.optimizers.index(plain)
        window = None if windows is None else windows.window(trainer, index)
        if window is None or window.count == 0:
            plain.zero_grad()
        elif window.holds_grads and not _holds_grads(plain):
            raise _removed(window, plain, trainer)
        if windows is not None and window is not None:
            _rescale_(window, plain, trainer)
            share = windows.weigh(window)
            loss = (loss if share is None else loss * share.to(accumulation_dtype(loss.dtype))) / window.size
        closes = window is None or window.count >= window.size or trainer.is_last_batch
        # A window that stays open needs no reduction over ranks. With several optimizers it is reduced all the same:
        # DDP would remember that the other windows' parameters were used, and look for gradients that are set aside.
        block = not closes and len(trainer.optimizers) == 1
        whole = contextlib.nullcontext() if session is None else session.losses.of(given)
        with without_reduction(trainer.strategy, block), _only(plain, trainer), whole:
            self.manual_backward(loss)
        if window is not None:
            window.holds_grads = _holds_grads(plain)
        if closes:
            _warn_if_unreached(plain, trainer)
            with contextlib.nullcontext() if windows is None else windows.closing(index):
                _step(wrapped, trainer)

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of an open window: under manual optimization Lightning takes every batch for a step."""
        windows = _open_windows(self.trainer)
        if windows is None or not windows.is_open:
            super().on_validation_model_zero_grad()


def _open_windows(trainer: Trainer) -> AccumulationWindows | None:
    session = Session.find(trainer)
    return None if session is None else session.windows


def _wrapped(trainer: Trainer, optimizer: Optimizer | LightningOptimizer | None) -> LightningOptimizer:
    """Return Lightning's wrapper of an optimizer, whose ``step`` calls the hooks and the scaler."""
    found: Any = trainer.lightning_module.optimizers(use_pl_optimizer=True)
    wrappers = found if isinstance(found, list) else [found]
    if optimizer is None and len(wrappers) == 1:
        return wrappers[0]
    for wrapper in wrappers:
        if optimizer is wrapper or optimizer is wrapper.optimizer:
            return wrapper
    given = f"another {type(optimizer).__name__}" if isinstance(optimizer, Optimizer) else type(optimizer).__name__
    fix = ""
    if optimizer is None:
        given = "none"
    elif isinstance(optimizer, list | tuple):
        given, fix = f"a {given} of them", "; call it once for each, with a loss for each"
    elif isinstance(optimizer, int) and not isinstance(optimizer, bool):
        inside = optimizer if 0 <= optimizer < len(wrappers) else 0
        given = str(optimizer)
        fix = "; write " + (
            f"`self.optimizers()[{inside}]`" if len(wrappers) > 1 else "`self.optimizers()`, or leave it out"
        )
    known = ", ".join(f"{index} ({type(wrapper.optimizer).__name__})" for index, wrapper in enumerate(wrappers))
    raise ValueError(
        f"`self.optimize(loss, optimizer)` takes one of `self.optimizers()`, which are {known}; got {given}{fix}"
    )


def _check_loss(loss: Any) -> None:
    """Raise if the loss is not a tensor that has one element and a gradient."""
    call = "`self.optimize(loss, optimizer)`"
    if not isinstance(loss, Tensor):
        raise TypeError(f"write {call}: the loss, a tensor, comes first, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss of {call} must be a scalar, got a tensor of shape {tuple(loss.shape)}: pass its mean,"
            " `loss.mean()`"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of {call} has no gradient: it was detached, computed under `torch.no_grad()`, or depends on no"
            " trainable parameter"
        )


def _holds_grads(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for parameter in parameters_of(optimizer))


def _step(wrapped: LightningOptimizer, trainer: Trainer) -> None:
    """Step; a step without any gradient moves nothing, and torch's GradScaler refuses it by an assertion."""
    try:
        wrapped.step()
    except AssertionError as error:
        if scaler_of(trainer) is None or _holds_grads(wrapped.optimizer):
            raise
        raise MisconfigurationException(
            f"{_name(wrapped.optimizer, trainer)} has no gradient in this step, and torch's GradScaler takes no such"
            " step. Call `optimize` only with a loss that depends on its trainable parameters: is it the loss of"
            " another optimizer, or was `detach()` called on the way?"
        ) from error


_UNREACHED = "_lightning_optim_unreached"  # name of the attribute of an optimizer that has had no gradient so far


def _warn_if_unreached(optimizer: Optimizer, trainer: Trainer) -> None:
    """Warn once, at the end of the first epoch, if the optimizer had a gradient in none of its steps.

    A step without a gradient moves nothing, and may be meant, as where a batch has nothing for this optimizer. An
    optimizer that has no step in the last batch is told at its first step of the next epoch. A resumed run has had its
    first epoch before. The count is kept at the optimizer, which each fit makes anew.
    """
    if trainer.ckpt_path or trainer.fast_dev_run or hides_weights(trainer.strategy):
        return
    first_epoch, steps = vars(optimizer).setdefault(_UNREACHED, (trainer.current_epoch, 0))
    if steps is None:  # told, or nothing to tell
        return
    if _holds_grads(optimizer):
        setattr(optimizer, _UNREACHED, (first_epoch, None))
    elif any(parameter.requires_grad for parameter in parameters_of(optimizer)):
        is_over = trainer.is_last_batch or trainer.current_epoch > first_epoch
        setattr(optimizer, _UNREACHED, (first_epoch, None if is_over else steps + 1))
        if is_over:
            rank_zero_warn(
                f"{_name(optimizer, trainer)} has had no gradient in any of its {steps + 1} steps, so that they moved"
                " nothing: no loss that `self.optimize` got for it depends on its trainable parameters. Is it the loss"
                " of another optimizer, or was `detach()` called on the way?"
            )


def _removed(window: Window, optimizer: Optimizer, trainer: Trainer) -> MisconfigurationException:
    """Make the error for an open window whose gradients are gone."""
    return MisconfigurationException(
        f"After {window.count} of {window.size} micro-batches the gradients of {_name(optimizer, trainer)} are gone:"
        " remove your calls of `zero_grad`, which `self.optimize` does itself where a window begins."
    )


def _name(optimizer: Optimizer, trainer: Trainer) -> str:
    return f"optimizer {trainer.optimizers.index(optimizer)} ({type(optimizer).__name__})"


def _rescale_(window: Window, optimizer: Optimizer, trainer: Trainer) -> None:
    """Multiply the gradients of a window to the present loss scale, which another optimizer's step may have changed."""
    scaler = scaler_of(trainer)
    if scaler is None:
        return
    scale = scaler.get_scale()
    if window.count and scale != window.scale:
        for parameter in parameters_of(optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(scale / window.scale)
    window.scale = scale


@contextlib.contextmanager
def _only(optimizer: Optimizer, trainer: Trainer) -> Iterator[None]:
    """Context manager: a backward pass leaves the gradients of the other optimizers' parameters as they were."""
    ours = set(map(id, parameters_of(optimizer)))
    others = [p for other in trainer.optimizers for p in parameters_of(other) if id(p) not in ours]
    kept = [parameter.grad for parameter in others]
    try:
        for parameter in others:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in zip(others, kept, strict=True):
            parameter.grad = grad
