"""Noise that is added to gradients and fades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule, value_at
from lightning_optim.base.selection import Selector
from lightning_optim.gradients.clipping.clipping import Clipping


class Noise(Clipping):
    r"""Add Gaussian noise that fades: :math:`g \leftarrow g + \mathcal{N}(0, \eta / (1 + t)^\gamma)`, t steps before.

    From arXiv:1511.06807: it helps deep networks that are hard to optimize out of where they started, and costs a draw
    of the size of the model in each step. Put it in front of a clipping in a list: the authors clip what has noise.

    Each step takes one number from a generator of its own, which is part of the state, and draws each whole tensor from
    it. A rank that holds a shard takes its part, so that replicas, shards and one process all see the same noise.

    Args:
        eta: The variance :math:`\eta \ge 0` at the first step. The paper tries 0.01, 0.3 and 1.
        gamma: :math:`\gamma \ge 0`, how fast it fades. Default 0.55, the paper's.
        seed: Where the generator starts, for the first optimizer; each further one has the next seed.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: What is left out of them, in the same terms.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> grad = torch.zeros(1000)
        >>> Noise(eta=0.01).clip_([grad])
        >>> grad.std()
        tensor(0.0985)
    """

    limits: ClassVar[bool] = False

    def __init__(
        self,
        eta: float | Schedule = 0.01,
        gamma: float = 0.55,
        seed: int = 0,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        check_number("eta", eta, low=0.0, schedule=True)
        check_number("gamma", gamma, low=0.0)
        check_number("seed", seed, low=0, integer=True)
        self.eta, self.gamma, self.seed, self.on, self.exclude = eta, gamma, seed, on, exclude
        self._state: Tensor | None = None

    @torch.no_grad()
    def clip_(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        *,
        norm: Tensor | None = None,
        step: int = 0,
        total: float = math.inf,
    ) -> Tensor | None:
        if not grads:
            return norm
        deviation = math.sqrt(value_at(self.eta, step, total) / (1 + step) ** self.gamma)
        seed = self._next_seed()
        generators: dict[torch.device, torch.Generator] = {}
        for grad in grads:
            shard = grad.to_local() if isinstance(grad, DTensor) else grad
            if shard.device not in generators:
                generators[shard.device] = torch.Generator(shard.device).manual_seed(seed)
            # Not the default dtype, which is half precision within a `training_step` in bf16-true.
            drawn = torch.empty(grad.shape, device=shard.device, dtype=torch.float32)
            drawn.normal_(generator=generators[shard.device])
            shard.add_(shards.shard_of(drawn, grad), alpha=deviation)
        return norm

    def _next_seed(self) -> int:
        generator = torch.Generator()
        if self._state is None:
            generator.manual_seed(self.seed + self.copy_index)
        else:
            generator.set_state(self._state)
        seed: int = torch.randint(2**62, (1,), generator=generator).tolist()[0]
        self._state = generator.get_state()
        return seed

    def state_dict(self) -> dict[str, Any]:
        return {} if self._state is None else {"generator": self._state.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state.get("generator")
