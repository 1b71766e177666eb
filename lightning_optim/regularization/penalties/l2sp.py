"""Penalize the distance of weights from where they were: at the start of the fit, or in a checkpoint."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.base import foreach, shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.construction import written
from lightning_optim.base.dtypes import accumulation_dtype, real_zeros_like
from lightning_optim.base.norms import sum_over_shards_
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selectors, select
from lightning_optim.base.state import WeightStates, per_weight
from lightning_optim.base.suggestions import shown
from lightning_optim.regularization.named_tensors import NamedTensors, check_named_tensors, tensors_by_name
from lightning_optim.regularization.penalties.penalty import Penalty

_SHARED = ("reference", "importance")  # by the copies for each optimizer, since they have the size of the model


class L2SP(Penalty):
    r"""Penalize the squared distance of weights from their starting point: :math:`s \sum F (w - w_0)^2`.

    Its gradient is :math:`2 s F (w - w_0)`. In fine-tuning it keeps the weights near those that were trained before,
    while an :class:`L2` penalty pulls them to zero (Li, Grandvalet and Davoine, *Explicit Inductive Bias for Transfer
    Learning with Convolutional Networks*, `arXiv:1802.01483 <https://arxiv.org/abs/1802.01483>`_). The factor F of each
    weight is 1, or given as ``importance``: with that of :func:`fisher_importance` it is elastic weight consolidation,
    EWC, whose :math:`\lambda` is :math:`2 s` (Kirkpatrick et al., *Overcoming catastrophic forgetting in neural
    networks*, `arXiv:1612.00796 <https://arxiv.org/abs/1612.00796>`_).

    The starting point is kept in checkpoints: a resumed run pulls to the start of the first run.

    Args:
        strength: The factor :math:`s \ge 0`. Without ``importance`` begin with 1e-2 and change it by factors of three.
            The importance of most weights is far below 1, so with it begin with 1e2 and change it by factors of ten.
        reference: The starting point: a dictionary of parameter name to tensor, or the path of a Lightning checkpoint
            or of a saved ``state_dict``. Default: the weights at the start of the fit. A weight that the reference
            lacks, such as that of a new head, is pulled to where it is at the start of the fit.
        importance: A dictionary of parameter name to a tensor of factors F >= 0, with one for each trainable weight
            that is penalized. Default: 1 for all.
        on: The parameters that are penalized, as in :class:`L1`. Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms. Leave out a new head, which has learned nothing
            yet that it should keep.

    Raises:
        ValueError: If an argument is not one of those above; before the first step, if the checkpoint cannot be read,
            the reference has none of the chosen weights, the importance lacks one, or a shape differs.

    Example::

        >>> weight = torch.tensor([[1.0, -2.0]])
        >>> penalty = L2SP(0.5)
        >>> penalty.value([weight])  # the first call keeps the starting point
        tensor(0.)
        >>> weight, grad = weight.add_(2.0), torch.zeros(1, 2)
        >>> penalty.add_grad_([weight], [grad])
        >>> penalty.value([weight]), grad
        (tensor(4.), tensor([[2., 2.]]))
        >>> callback = WeightRegularization(L2SP(0.01, exclude="head.*"))  # for Trainer(callbacks=[callback])

    In a hand-written loop ``penalty.name_weights(model)`` tells the names, which ``reference`` and ``importance`` need.
    """

    start: WeightStates

    def __init__(
        self,
        strength: float | Schedule,
        reference: NamedTensors | str | Path | None = None,
        importance: NamedTensors | None = None,
        on: Selectors = None,
        exclude: Selectors = None,
    ) -> None:
        self.strength = check_number("strength", strength, low=0.0, schedule=True)
        self.reference = check_named_tensors("reference", reference, path=True)
        self.importance = check_named_tensors("importance", importance)
        if importance is not None and not all(bool((one >= 0.0).all()) for one in importance.values()):
            wrong = next(name for name, one in importance.items() if not bool((one >= 0.0).all()))
            raise ValueError(f"`importance` must hold numbers >= 0, got a tensor with others for {wrong!r}")
        super().__init__(on, exclude)
        self.add_state("start", per_weight(torch.clone))
        self._importance = WeightStates(real_zeros_like)  # in fp32 or better, since it is often tiny
        self._named = False

    @property
    def in_words(self) -> str:
        text = self.brief
        for name in _SHARED:
            if isinstance(given := getattr(self, name), Mapping):
                text = text.replace(f"{name}={written(given)}", f"{name}={{{len(given)} tensors}}")
        return text

    def reset(self) -> None:
        super().reset()
        self._importance.clear()

    def name_weights(self, module: nn.Module) -> None:
        """Find the weights by the names of a module, and check that reference and importance fit them.

        Raises:
            ValueError: If they do not; the message names the way out.
        """
        super().name_weights(module)
        self._importance.name_weights(module)
        self._named = True
        chosen = {
            name: p for name, p in select(module, self.on, self.exclude, required=False).items() if not is_lazy(p)
        }
        trained = {name: p for name, p in chosen.items() if p.requires_grad}
        if self.reference is not None:
            self.start.source = given = _Given("reference", self.reference, required=False)
            # What a checkpoint of this run holds is not read from the reference, whose file may be gone.
            if wanted := trained.keys() - self.start.named().keys():
                given.check({name: trained[name] for name in wanted}, any_of=chosen)
        if self.importance is not None:
            self._importance.source = given = _Given("importance", self.importance)
            given.check(trained)

    def _value(self, weights: Sequence[Tensor]) -> Tensor:
        parts = [self._distance(*one) for one in zip(*self._local(weights), strict=True)]
        if not parts:
            return torch.zeros(())
        sums = torch.stack([part.to(parts[0].device) for part in parts])
        return self.current(self.strength) * sum_over_shards_(sums, weights).sum()

    def _distance(self, weight: Tensor, start: Tensor, importance: Tensor | None = None) -> Tensor:
        dtype = accumulation_dtype(weight.dtype)
        squares = (weight.to(dtype) - start).abs().square()
        return (squares if importance is None else squares * importance).sum()

    def _add_grad_(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        local = self._local(weights)  # also while the strength is 0, so that the starting point is that of the fit
        if factor := 2.0 * self.current(self.strength):
            for some_weights, some_starts, *some_factors, some_grads in foreach.chunks(
                *local, shards.local_shards(grads)
            ):
                moved = torch._foreach_sub(some_weights, some_starts)
                for importances in some_factors:
                    # In half precision a small factor would vanish.
                    moved = torch._foreach_mul(importances, moved)
                torch._foreach_add_(some_grads, moved, alpha=factor)

    def _local(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the local parts of weights, of their starting points, and of their importance if it is given."""
        if not self._named and (self.reference is not None or self.importance is not None):
            raise ValueError(
                "L2SP finds the tensors of `reference` and `importance` by names: call `name_weights(module)` before."
            )
        lists = [weights, self.start.of(weights)]
        lists += [] if self.importance is None else [self._importance.of(weights)]
        return [shards.local_shards(tensors) for tensors in lists]

    def __deepcopy__(self, memo: dict[int, Any]) -> L2SP:
        """Copy the policy; the tensors that were given are shared."""
        memo |= {id(tensors): tensors for name in _SHARED if (tensors := getattr(self, name)) is not None}
        made = memo[id(self)] = type(self).__new__(type(self))
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return made


class _Given:
    """Return the tensor that a user gave for a weight, by its name. A file is read when the first one is asked for.

    Args:
        argument: The argument of :class:`L2SP`, for messages.
        value: What was passed.
        required: Raise an error for a weight without a tensor.
    """

    def __init__(self, argument: str, value: NamedTensors | str | Path, required: bool = True) -> None:
        self._argument, self._value, self._required = argument, value, required

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return tensors_by_name(self._argument, self._value)

    def check(self, weights: Mapping[str, Tensor], any_of: Mapping[str, Tensor] | None = None) -> None:
        """Raise an error if the tensor of one of the weights is missing or has another shape.

        Args:
            weights: The weights by name.
            any_of: If given, the weights of which at least one must have a tensor.
        """
        if any_of and not any_of.keys() & self._tensors.keys():
            raise ValueError(
                f"`{self._argument}` of L2SP has none of the chosen parameters: rename its keys, or choose others with"
                f" `on`. Its names: {shown(self._tensors)}. The chosen parameters: {shown(any_of)}"
            )
        for name, weight in weights.items():
            self(name, weight)

    def __call__(self, name: str, weight: Tensor) -> Tensor | None:
        found = self._tensors.get(name)
        if found is None and self._required:
            raise ValueError(
                f"`{self._argument}` of L2SP has no tensor for the parameter {name!r}: leave it out with `exclude`. Its"
                f" names: {shown(self._tensors)}"
            )
        if found is not None and found.shape != weight.shape:
            raise ValueError(
                f"`{self._argument}` of L2SP has a tensor of shape {tuple(found.shape)} for the parameter {name!r} of"
                f" shape {tuple(weight.shape)}: leave the parameter out with `exclude`, or remove the tensor."
            )
        return found
