"""Clipping by a bound on the norm."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selectors
from lightning_optim.gradients.clipping.clipping_policy import Scope
from lightning_optim.gradients.clipping.norm_clipping_policy import NormClipping


class ClipByNorm(NormClipping):
    r"""Scale all gradients by one factor: :math:`g \cdot \min(1, c / (n + 10^{-6}))`, so that their norm is at most c.

    :math:`n` is the norm of all gradients together, so the direction of the step is kept (Pascanu, Mikolov and Bengio,
    *On the difficulty of training recurrent neural networks*, `arXiv:1211.5063 <https://arxiv.org/abs/1211.5063>`_).
    The result is that of :func:`torch.nn.utils.clip_grad_norm_`, except that the norm of half-precision gradients is
    computed in fp32, and that it is exact for any mixture of DTensors and plain tensors whose values agree on all
    ranks. If the norm is NaN or infinite, so are the gradients afterwards, as in torch.

    Args:
        max_norm: The bound :math:`c > 0`; 1.0 is common. ``inf`` never clips and still returns the norm.
        norm_type: Exponent p > 0 of the norm; ``inf`` for the largest absolute value. Default 2.
        scope: Parts with a norm of their own: ``"global"``, all gradients of an optimizer together; ``"group"``, each
            of its ``param_groups``; ``"tensor"``, each tensor. The last two change the direction of the step.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``max_norm`` is not a number > 0 or a schedule of such numbers, ``norm_type`` not a number > 0,
            or ``scope`` none of the three.

    Example::

        >>> grads = [torch.tensor([3.0]), torch.tensor([[4.0]])]
        >>> ClipByNorm(1.0).clip_(grads)
        tensor(5.)
        >>> grads
        [tensor([0.6000]), tensor([[0.8000]])]

    For a Trainer: ``Trainer(callbacks=[GradientClipping(ClipByNorm(1.0))])``.
    """

    def __init__(
        self,
        max_norm: float | Schedule,
        norm_type: float = 2.0,
        scope: Scope = "global",
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.max_norm = check_number("max_norm", max_norm, low=0.0, low_open=True, high=math.inf, schedule=True)
        super().__init__(norm_type, scope, on, exclude)

    @property
    def in_words(self) -> str:
        if self.max_norm == math.inf:
            return "clip nothing"
        return f"clip norm {self.max_norm}" if len(self._written) == 1 else super().in_words

    def _bound(self, norms: Tensor) -> float:
        return self.current(self.max_norm)

    def bound_in_force(self, *, step: int = 0, total: float = math.inf) -> float | None:
        # Also where `clip_` was not called, because the policy was idle.
        return value_at(self.max_norm, step, total) if self.scope == "global" else None

    def is_idle(self, norm: float, *, step: int = 0, total: float = math.inf) -> bool:
        # A part has no larger norm than the whole, so it holds for every scope.
        return norm + 1e-6 <= value_at(self.max_norm, step, total)
