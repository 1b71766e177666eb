"""What every policy shares: a readable ``repr``, an identity that outlives tuned numbers, and its state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeVar


class Policy:
    """The base class of all policies: pure torch, no Trainer.

    A policy says *what* is done to tensors; a callback says *when*. A policy keeps each constructor argument in an
    attribute of the same name, so that it prints as it was written and pickles. What it must remember between steps is
    in :meth:`state_dict`; a callback keeps one copy of the policy for each optimizer.

    Example::

        >>> class Scale(Policy):
        ...     def __init__(self, factor, on=None):
        ...         self.factor, self.on = factor, on
        >>> Scale(0.5, on="encoder.*")
        Scale(factor=0.5, on='encoder.*')
        >>> Scale(0.5, on="encoder.*").identity == Scale(0.9, on="encoder.*").identity
        True

    Attributes:
        identity_args: The constructor arguments that say *which* policy this is. Numbers that a user tunes are left
            out, so that a resumed run finds its state although they were changed.
        needs: The smallest part of a tensor that the formula can be computed on. Sharded tensors hold any elements, but
            not whole rows or matrices.
        copy_index: For which of several optimizers this copy is, so that random draws of theirs differ.
    """

    identity_args: ClassVar[tuple[str, ...]] = ("on", "exclude")
    needs: ClassVar[Literal["elements", "rows", "matrices"]] = "elements"
    copy_index: int = 0

    @property
    def identity(self) -> str:
        """The class and its :attr:`identity_args`, the same in every process."""
        chosen = {
            name: _stable(value) for name in self.identity_args if (value := getattr(self, name, None)) is not None
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in chosen.items())})"

    @property
    def scheduled(self) -> bool:
        """Whether a number of this policy is a schedule that needs the run's length."""
        return any(not getattr(value, "constant", True) for value in vars(self).values())

    def state_dict(self) -> dict[str, Any]:
        """What is remembered between steps: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""

    def __repr__(self) -> str:
        arguments = inspect.signature(type(self).__init__).parameters
        shown = {name: getattr(self, name) for name in arguments if hasattr(self, name)}
        defaults = {name: arguments[name].default for name in shown}
        pairs = [f"{name}={value!r}" for name, value in shown.items() if not _same(value, defaults[name])]
        return f"{type(self).__name__}({', '.join(pairs)})"


P = TypeVar("P", bound=Policy)


class PerOptimizer(Generic[P]):
    """One copy of some policies for each optimizer, made when it is first asked for.

    So state may be loaded before the optimizers are there.
    """

    def __init__(self, policies: Sequence[P]) -> None:
        self._template = list(policies)
        self._copies: list[list[P]] = []

    def __getitem__(self, index: int) -> list[P]:
        while len(self._copies) <= index:
            self._copies.append(copy.deepcopy(self._template))
            for policy in self._copies[-1]:
                policy.copy_index = len(self._copies) - 1
        return self._copies[index]

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """For each optimizer the state of each policy."""
        return [[policy.state_dict() for policy in policies] for policies in self._copies]

    def load_state_dict(self, state: list[list[dict[str, Any]]]) -> None:
        """Take over what :meth:`state_dict` returned."""
        for index, states in enumerate(state):
            for policy, its_state in zip(self[index], states, strict=True):
                policy.load_state_dict(its_state)


def _stable(value: Any) -> str:
    """A text for ``value`` that does not hold a memory address."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_stable(item) for item in value)}]"
    if isinstance(value, Policy):
        return value.identity
    if isinstance(value, partial):
        return f"{_stable(value.func)}{value.args}{value.keywords}"
    return getattr(value, "__qualname__", None) or repr(value)


def _same(value: Any, default: Any) -> bool:
    """Equal and of one type, so that 1 is not taken for 1.0 or True."""
    return type(value) is type(default) and value == default
