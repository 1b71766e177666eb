"""Step with the gradient at the worst point nearby (sharpness-aware minimization): two losses in each step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_optim.base import shards, sparse
from lightning_optim.base.arguments import check_number
from lightning_optim.base.layer_classes import RunningNormBase
from lightning_optim.base.norms import tensor_norms
from lightning_optim.runtime.lightning import (
    GradientAccumulationScheduler,
    LightningOptimizer,
    MisconfigurationException,
    ModuleMixin,
)
from lightning_optim.runtime.lightning.log_interception import intercept_log
from lightning_optim.runtime.lightning.loops import keep_result
from lightning_optim.runtime.order import Slot, callbacks_in
from lightning_optim.runtime.refusals import hides_weights
from lightning_optim.runtime.step import gradients_of


class SharpnessAwareMixin(ModuleMixin):
    r"""Step with the gradient at the worst point nearby, which finds flat minima: SAM, or ASAM with ``adaptive``.

    SAM takes the gradient at :math:`w + \rho \, g / \lVert g \rVert`; ASAM takes it at
    :math:`w + \rho \, w^2 g / \lVert |w| g \rVert`, which does not change when a layer is scaled. The weights are then
    restored from a copy, before the step. So a step costs two forward and backward passes, and a copy of the weights.

    In the second pass dropout draws the same masks, BatchNorm keeps its statistics, and ``self.log`` does nothing: the
    logged loss, and ``outputs["loss"]``, is the loss at the weights themselves. If ``training_step`` updates a metric
    by hand, it asks ``self.second_pass`` first. Penalties, clipping and all other callbacks act on the second gradient,
    once. Under DDP the first gradient is averaged over the ranks too, so that the step is that of one process with the
    whole batch.

    Papers: Foret et al., `Sharpness-Aware Minimization for Efficiently Improving Generalization
    <https://arxiv.org/abs/2010.01412>`_; Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_.

    Args:
        rho: Distance :math:`\rho > 0`. Default 0.05, as in the paper; ASAM needs about ten times as much.
        adaptive: True to measure the distance relative to the weights (ASAM).

    Attributes:
        second_pass: True while ``training_step`` runs at the perturbed weights.

    Raises:
        ValueError: If ``rho`` is not a number > 0.
        MisconfigurationException: Under manual optimization; with accumulation, since the micro-batches of a window
            would be needed twice; under LBFGS, DeepSpeed, FSDP1 and XLA.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import SharpnessAwareMixin
        >>> class Model(SharpnessAwareMixin, BoringModel):
        ...     def __init__(self):
        ...         super().__init__(rho=0.1)
        >>> from lightning.pytorch import Trainer
        >>> Trainer(max_steps=3, barebones=True).fit(Model())
    """

    second_pass: bool = False

    def __init__(self, *args: Any, rho: float = 0.05, adaptive: bool = False, **kwargs: Any) -> None:
        check_number("rho", rho, low=0.0, low_open=True)
        super().__init__(*args, **kwargs)
        self.rho, self.adaptive = rho, adaptive

    def on_fit_start(self) -> None:
        """Raise an error for optimizers and settings that the mixin cannot work with."""
        super().on_fit_start()
        for optimizer in self.trainer.optimizers:
            self._refuse(optimizer)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Raise an error under manual optimization, where the mixin cannot evaluate ``training_step`` twice."""
        self._refuse_manual()
        super().manual_backward(loss, *args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step with a closure that evaluates the gradient twice, before the hooks of the step, which see the second."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        self._refuse(plain)
        assert optimizer_closure is not None
        first: Callable[[], Any] = optimizer_closure

        def twice() -> Any:
            generators = _generators(self.device)
            loss = first()
            weights, grads = gradients_of(plain)
            if weights:
                # Lightning reports the last result of the closure, and should report the first one.
                with keep_result(first), _perturbed(weights, grads, self.rho, self.adaptive), self._quiet(generators):
                    first()
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, twice)

    @contextlib.contextmanager
    def _quiet(self, generators: list[tuple[Any, Tensor]]) -> Iterator[None]:
        """Context manager: log nothing, repeat the random draws of the first pass, and keep BatchNorm statistics."""
        buffers = [
            buffer
            for module in self.modules()
            if isinstance(module, RunningNormBase)
            for buffer in module.buffers(recurse=False)
        ]
        kept = [buffer.clone() for buffer in buffers]
        for device, state in generators:
            device.set_rng_state(state)
        self.second_pass = True
        try:
            with intercept_log(self):
                yield
        finally:
            self.second_pass = False
            with torch.no_grad():
                for buffer, before in zip(buffers, kept, strict=True):
                    buffer.copy_(before)

    def _refuse_manual(self) -> None:
        if not self.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} has SharpnessAwareMixin under manual optimization, and the mixin evaluates"
                " `training_step` twice in a step: set `automatic_optimization = True`."
            )

    def _refuse(self, optimizer: Optimizer) -> None:
        self._refuse_manual()
        trainer = self.trainer
        accumulates = callbacks_in(trainer, Slot.ACCUMULATE) or trainer.accumulate_grad_batches != 1
        if accumulates or any(isinstance(other, GradientAccumulationScheduler) for other in trainer.callbacks):
            raise MisconfigurationException(
                "SharpnessAwareMixin evaluates the batch of a step twice, and the earlier micro-batches of a window are"
                " no longer there at the step: remove the accumulation, and make the batches larger."
            )
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "SharpnessAwareMixin evaluates two gradients in a step, and LBFGS many: use a first-order optimizer."
            )
        if sentence := hides_weights(self.trainer.strategy):
            raise MisconfigurationException(f"SharpnessAwareMixin moves the weights within a step: {sentence}.")


def _generators(device: torch.device) -> list[tuple[Any, Tensor]]:
    """Return the random generators of the CPU and of the module's device, with their states."""
    modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    return [(module, module.get_rng_state()) for module in modules]


@contextlib.contextmanager
def _perturbed(weights: list[Tensor], grads: list[Tensor], rho: float, adaptive: bool) -> Iterator[None]:
    """Context manager: the weights are those of the worst point nearby; afterwards they are restored from a copy."""
    ours = shards.local_shards([weight.detach() for weight in weights])
    kept = [weight.clone() for weight in ours]
    try:
        _perturb_(weights, grads, rho, adaptive)
        yield
    finally:
        torch._foreach_copy_(ours, kept)


@torch.no_grad()
def _perturb_(weights: list[Tensor], grads: list[Tensor], rho: float, adaptive: bool) -> None:
    rows, values = sparse.dense_rows(weights, grads)
    own, slopes = shards.local_shards(rows), shards.local_shards(values)
    if adaptive:
        scaled = list(torch._foreach_abs(own))
        torch._foreach_mul_(scaled, slopes)
        measured = [shards.placed_as(part, like) for part, like in zip(scaled, grads, strict=True)]
        moves = torch._foreach_pow(own, 2)
        torch._foreach_mul_(moves, slopes)
    else:
        measured, moves = values, torch._foreach_mul(slopes, 1.0)
    # `total_norm` rounds differently: this norm gives the step of common implementations bit for bit.
    norm = tensor_norms(measured).square().sum().sqrt()
    # If the norm is not finite, neither is the second gradient: GradientClipping skips the step.
    scale = rho / (norm + 1e-12)
    torch._foreach_mul_(moves, [scale.to(move.device) for move in moves])
    torch._foreach_add_(own, moves)
    for weight, grad, moved in zip(weights, grads, own, strict=True):
        if grad.is_sparse:  # a copy of the rows that have a gradient
            weight[tuple(grad.indices())] = moved
