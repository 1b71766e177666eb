"""Gaussian noise on gradients, which fades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optim.base import shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors
from lightning_optim.gradients.clipping.clipping_policy import Clipping


class Noise(Clipping):
    r"""Add Gaussian noise that fades: :math:`g \leftarrow g + \mathcal{N}(0, \eta / (1 + t)^\gamma)`, t steps before.

    From Neelakantan et al., *Adding Gradient Noise Improves Learning for Very Deep Networks*
    (`arXiv:1511.06807 <https://arxiv.org/abs/1511.06807>`_): it helps deep networks to leave a poor start, and costs a
    draw of the size of the model in each step. Put it in front of a clipping in a list: the authors clip the noisy
    gradient.

    Each step takes one number from a generator of its own, which is part of the state, and draws each whole tensor from
    it. A rank that holds a shard takes its part, so that replicas, shards and one process all see the same noise.

    Args:
        eta: The variance :math:`\eta \ge 0` at the first step. The paper tries 0.01, 0.3 and 1.
        gamma: Exponent :math:`\gamma \ge 0` with which it fades. Default 0.55, the paper's.
        seed: Seed of the generator, >= 0, for the first optimizer; each further one has the next seed.
        on: The parameters on whose gradients it acts: a glob over names, a module class, a predicate, or a list of
            these. Default: all.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If an argument is out of its range.

    Example::

        >>> grad = torch.zeros(1000)
        >>> Noise(eta=0.01).clip_([grad])
        >>> grad.std()
        tensor(0.0985)

    For a Trainer: ``Trainer(callbacks=[GradientClipping([Noise(), ClipByNorm(1.0)])])``.
    """

    limits: ClassVar[bool] = False

    generator: Tensor | None

    def __init__(
        self,
        eta: float | Schedule = 0.01,
        gamma: float = 0.55,
        seed: int = 0,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.eta = check_number("eta", eta, low=0.0, schedule=True)
        self.gamma = check_number("gamma", gamma, low=0.0)
        self.seed = check_number("seed", seed, low=0, integer=True)
        super().__init__(on, exclude)
        self.add_state("generator", None)

    def _clip_(self, grads: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        deviation = math.sqrt(self.current(self.eta) / (1 + self._step) ** self.gamma)
        seed = self._next_seed()
        generators: dict[torch.device, torch.Generator] = {}
        for grad in grads:
            shard = grad.to_local() if isinstance(grad, DTensor) else grad
            if shard.device not in generators:
                generators[shard.device] = torch.Generator(shard.device).manual_seed(seed)
            # In fp32: the default dtype is half precision within a `training_step` in bf16-true.
            drawn = torch.empty(grad.shape, device=shard.device, dtype=torch.float32)
            drawn.normal_(generator=generators[shard.device])
            shard.add_(shards.shard_of(drawn, grad), alpha=deviation)

    def _next_seed(self) -> int:
        generator = torch.Generator()
        if self.generator is None:
            generator.manual_seed(self.seed + self.copy_index)
        else:
            generator.set_state(self.generator)
        seed: int = torch.randint(2**62, (1,), generator=generator).tolist()[0]
        self.generator = generator.get_state()
        return seed
