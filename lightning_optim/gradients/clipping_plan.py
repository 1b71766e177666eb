"""Read the ``policy`` argument of GradientClipping: which policy acts on which parameters of which optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_optim.base.module_tensors import plain_name
from lightning_optim.base.policy import belongs_to
from lightning_optim.base.schedules import Schedule
from lightning_optim.base.selection import Selection, select
from lightning_optim.base.suggestions import nearest_pattern, shown
from lightning_optim.gradients.clipping.by_norm import ClipByNorm
from lightning_optim.gradients.clipping.clipping_policy import Clipping
from lightning_optim.runtime.lightning import MisconfigurationException, Trainer

Bounds: TypeAlias = float | Clipping | Sequence[float | Clipping]

_ALLOWED = (
    "a number > 0, a clipping policy or a list of them; or a dictionary of these, by patterns over parameter names such"
    ' as {"encoder.*": 1.0, "*": 0.5}, or by indices of optimizers such as {0: 1.0, 1: ZClip()}'
)


@dataclass(frozen=True)
class Part:
    """Policy, and the gradients on which it acts beside its own ``on`` and ``exclude``.

    Attributes:
        policy: The policy.
        optimizer: Index of the only optimizer whose gradients it changes; ``None`` for each optimizer.
        pattern: Glob over the names of the parameters on whose gradients it acts; ``None`` for all.
        earlier: Globs that come before this one and take their parameters first.
    """

    policy: Clipping
    optimizer: int | None = None
    pattern: str | None = None
    earlier: tuple[str, ...] = ()

    def acts_on(self, index: int) -> bool:
        """Return True if it changes gradients of the optimizer with this index."""
        return self.optimizer in (None, index)

    def choose(self, module: nn.Module) -> Chosen | None:
        """Return the parameters on whose gradients it acts; ``None`` for all of an optimizer's.

        Raises:
            ValueError: If a pattern, or the policy's own ``on`` or ``exclude``, chooses no parameter of the module.
        """
        policy = self.policy
        selections = []
        if self.pattern is not None:
            self._check_pattern(module, self.pattern)
            selections.append(Selection(module, self.pattern, self.earlier))
        if policy.on is not None or policy.exclude is not None:
            selections.append(Selection(module, "*" if policy.on is None else policy.on, policy.exclude))
        chosen = Chosen(selections) if selections else None
        if len(selections) == 2 and chosen is not None and not chosen.ids:
            raise ValueError(
                f"`policy={{{self.pattern!r}: {policy!r}}}`: the policy chooses no parameter of this pattern"
            )
        return chosen

    def _check_pattern(self, module: nn.Module, pattern: str) -> None:
        if not select(module, pattern, required=False):
            known = [plain_name(name) for name, _ in module.named_parameters(remove_duplicate=False)]
            raise ValueError(
                f"the pattern {pattern!r} in `policy` matches no parameter of {type(module).__name__}"
                f"{nearest_pattern(pattern, known) or '.'} Its parameters: {shown(known)}"
            )
        # A last "*" for the rest may find that there is no rest.
        if pattern != "*" and not select(module, pattern, self.earlier):
            raise ValueError(
                f"the pattern {pattern!r} in `policy` has no parameter left, since the first pattern that matches wins:"
                f" put it before {', '.join(map(repr, self.earlier))}"
            )


class Chosen:
    """Parameters that each of some selections chooses.

    Args:
        selections: One or more; the parameters that all of them choose are taken.
    """

    def __init__(self, selections: Sequence[Selection]) -> None:
        self._selections = selections

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Choose again if some of an optimizer's parameters are new to the module."""
        for selection in self._selections:
            selection.follow(parameters)

    @property
    def ids(self) -> set[int]:
        """The ``id`` of each chosen parameter."""
        first, *others = (selection.ids for selection in self._selections)
        return first.intersection(*others) if others else first


def parts_of(policy: Any) -> list[Part]:
    """Return the parts of the ``policy`` argument, in the order in which they act.

    Example::

        >>> [(part.pattern, part.policy) for part in parts_of({"encoder.*": 1.0, "*": [2.0, 3.0]})]
        [('encoder.*', ClipByNorm(1.0)), ('*', ClipByNorm(2.0)), ('*', ClipByNorm(3.0))]
        >>> [(part.optimizer, part.policy) for part in parts_of({1: 0.5})]
        [(1, ClipByNorm(0.5))]

    Raises:
        ValueError: If it is not one of the forms that :class:`GradientClipping` takes.
    """
    if not isinstance(policy, Mapping):
        return [Part(one) for one in _policies("policy", policy)]
    keys = list(policy)
    patterns = keys if all(isinstance(key, str) for key in keys) else []
    if not keys or (not patterns and not all(map(_is_index, keys))):
        raise ValueError(f"`policy={policy!r}` must be {_ALLOWED}; all keys of one kind, and at least one")
    parts = []
    for place, (key, value) in enumerate(policy.items()):
        for one in _policies(f"policy[{key!r}]", value):
            parts.append(Part(one, None, key, tuple(keys[:place])) if patterns else Part(one, optimizer=key))
    return parts


def _policies(name: str, value: Any) -> list[Clipping]:
    listed = list(value) if isinstance(value, list | tuple) else [value]
    policies = [ClipByNorm(float(one)) if _is_bound(one) else one for one in listed]
    if name == "policy" and len(listed) > 1 and all(map(_is_bound, listed)):
        by_optimizer = ", ".join(f"{index}: {bound}" for index, bound in enumerate(listed))
        raise ValueError(
            f"`{name}={value!r}`: the bounds in a list act in turn on each optimizer, so the smallest alone counts."
            f" Write one bound, or one for each optimizer: {{{by_optimizer}}}"
        )
    if not policies or not all(isinstance(one, Clipping) for one in policies):
        allowed = _ALLOWED if name == "policy" else _ALLOWED.partition(";")[0]
        schedule = next((one for one in listed if isinstance(one, Schedule)), None)
        instead = (
            belongs_to(value, Clipping) if schedule is None else f"; for a schedule write ClipByNorm({schedule!r})"
        )
        raise ValueError(f"`{name}={value!r}` must be {allowed}{instead}")
    for one in policies:
        one.check_complete()
    return policies


def _is_bound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= math.inf


def _is_index(key: Any) -> bool:
    return isinstance(key, int) and not isinstance(key, bool) and key >= 0


def check_optimizers(parts: Sequence[Part], trainer: Trainer) -> None:
    """Raise if a part is for an optimizer that the Trainer does not have."""
    optimizers = trainer.optimizers
    wrong = sorted({part.optimizer for part in parts if part.optimizer is not None} - set(range(len(optimizers))))
    if wrong:
        model = type(trainer.lightning_module).__name__
        known = ", ".join(f"{index} ({type(optimizer).__name__})" for index, optimizer in enumerate(optimizers))
        raise MisconfigurationException(
            f"`policy` of GradientClipping has a bound for optimizer {wrong[0]}, and the optimizers of {model} are"
            f" {known}: write the index in `trainer.optimizers`, which is that in `configure_optimizers`."
        )
