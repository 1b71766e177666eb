"""Define the base classes of policies: repr, identity, schedules, declared state, one copy per optimizer."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn

from lightning_optim.base.construction import Constructed
from lightning_optim.base.selection import Selectors, check_selectors
from lightning_optim.base.state import State, Value


class NotACallback(AttributeError, TypeError):
    """Say that a policy was passed in the place of a callback; for ``hasattr`` it is an attribute that is missing."""


class Policy(Constructed):
    """Base class of all policies: formulas on tensors, in pure torch, without a Trainer.

    A policy says *what* is done to tensors; a callback says *when*. A policy prints as it was written, and pickles; it
    keeps each constructor argument in an attribute of the same name. State between steps is declared
    with :meth:`add_state`; a callback keeps one copy of the policy for each optimizer.

    Example::

        >>> class Scale(Policy):
        ...     def __init__(self, factor, on=None):
        ...         self.factor, self.on = factor, on
        ...         self.add_state("calls", 0)
        >>> Scale(0.5, on="encoder.*")
        Scale(0.5, on='encoder.*')
        >>> Scale(0.5, on="encoder.*").identity == Scale(0.9, on="encoder.*").identity
        True
        >>> Scale(0.5).state_dict()
        {'calls': 0}

    Attributes:
        identity_args: Names of the constructor arguments that make up :attr:`identity`. Numbers that a user tunes are
            left out, so that a resumed run finds its state although they were changed.
        formulas: Methods that a base class leaves to its subclasses, each followed by those that call it. A subclass
            overrides at least one of them.
        needs: The smallest part of a tensor that the formula can be computed on. Shards hold any elements, but not
            whole rows or matrices; the looked-up rows of a sparse gradient are not a matrix. An attribute of the class,
            or of an object whose arguments decide it.
        gathers: True if the formula gathers sharded tensors itself, or sums over shards, so that a sharded model has
            what it needs.
        needs_real: True if the formula has no meaning for complex numbers.
        used_in: Callback that takes the policy, as a format string for messages.
        copy_index: Index of the optimizer that this copy belongs to, so that random draws differ.
    """

    identity_args: ClassVar[tuple[str, ...]] = ("on", "exclude")
    formulas: ClassVar[tuple[tuple[str, ...], ...]] = ()
    needs: Literal["elements", "rows", "matrices"] = "elements"
    gathers: bool = False
    needs_real: ClassVar[bool] = False
    used_in: ClassVar[str] = ""
    copy_index: int = 0
    _states: Mapping[str, State] = MappingProxyType({})
    _step: int = 0
    _total: float = math.inf

    @property
    def identity(self) -> str:
        """The class and its :attr:`identity_args` as text, the same in every process."""
        chosen = {
            name: _stable(value) for name in self.identity_args if (value := getattr(self, name, None)) is not None
        }
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in chosen.items())})"

    def check_complete(self) -> None:
        """Check that a subclass has overridden each of its base class's :attr:`formulas`.

        Raises:
            NotImplementedError: If one is missing.
        """
        kind = type(self)
        for base in kind.__mro__:
            for names in vars(base).get("formulas", ()):
                if all(getattr(kind, name) is vars(base)[name] for name in names):
                    raise NotImplementedError(f"{kind.__name__} must override `{names[0]}` of {base.__name__}")

    @property
    def in_words(self) -> str:
        """The policy in the lines that a callback logs at the start of a fit; by default as one writes it in short."""
        return self.brief

    # ---- in the place of a callback ------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tell that a policy is no callback: a Trainer asks each of its callbacks for this key."""
        raise NotACallback(self._is_no_callback())

    def __iter__(self) -> Iterator[Any]:
        """Tell the same to ``Trainer(callbacks=policy)``."""
        raise NotACallback(self._is_no_callback())

    def _is_no_callback(self) -> str:
        instead = f": write {self.in_its_place}" if self.used_in else ""
        return f"{self!r} is a policy, not a callback{instead}"

    @property
    def in_its_place(self) -> str:
        """The policy as an argument of the callback that takes it, for a message; empty if none of ours does."""
        return self.used_in.format(self.brief)

    # ---- schedules ---------------------------------------------------------------------------------------------------

    @property
    def scheduled(self) -> bool:
        """True if an argument, or one of a nested policy, is a schedule that needs the length of the run."""
        return any(map(is_scheduled, vars(self).values()))

    def current(self, number: Any) -> float:
        """Return the value of a number or a schedule at the present step; for use in a formula.

        The public methods of a policy (``clip_``, ``value``, ``project_``, …) take ``step`` and ``total`` and set the
        present step; a formula needs neither as an argument.
        """
        return number(self._step, self._total) if callable(number) else number

    def _at(self, step: int, total: float) -> None:
        """Set the present step: the optimizer steps made before, and those of the whole run."""
        self._step, self._total = step, total

    # ---- state -------------------------------------------------------------------------------------------------------

    def add_state(self, name: str, default: Any = None) -> None:
        """Declare what the policy remembers between steps; call it in the constructor.

        The state is an attribute of this name. It is reset, saved, loaded and copied per optimizer without another
        line. A leading underscore is not part of the name in a checkpoint.

        Args:
            name: Name of the attribute.
            default: The value at the start: a plain value (number, text, ``None``, infinity, a list of these, a
                tensor), or one of the other kinds: :func:`~lightning_optim.base.per_unit`,
                :func:`~lightning_optim.base.ring`, :func:`~lightning_optim.base.per_weight`,
                :func:`~lightning_optim.base.nested`.
        """
        kind = default if isinstance(default, State) else Value(default)
        self._states = {**self._states, name: kind}
        setattr(self, name, kind.first())

    def reset(self) -> None:
        """Set each declared state back to its start, as before the first step."""
        for name, kind in self._states.items():
            setattr(self, name, kind.reset(getattr(self, name)))

    def state_dict(self) -> dict[str, Any]:
        """Return the declared states: tensors and plain values. Tensors beside weights are live storage."""
        return {name.lstrip("_"): kind.save(getattr(self, name)) for name, kind in self._states.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned. A declared state that is missing in it starts anew."""
        self.reset()
        for name, kind in self._states.items():
            if (key := name.lstrip("_")) in state:
                setattr(self, name, kind.load(state[key], getattr(self, name)))

    def name_weights(self, module: nn.Module) -> None:
        """Save and load tensors beside weights by the names of a module, instead of by order.

        A callback does it for its policies. The module is not kept alive.
        """
        for name, kind in self._states.items():
            kind.name_weights(getattr(self, name), module)

    def _known_units(self) -> int:
        """Return the number of units of which there is a state."""
        return max((kind.units(getattr(self, name)) for name, kind in self._states.items()), default=0)

    def _grow(self, units: int, like: Tensor) -> None:
        """Give each state per unit so many columns, on the device of ``like``."""
        for name, kind in self._states.items():
            setattr(self, name, kind.grow(getattr(self, name), units, like))


class ParameterPolicy(Policy):
    """Base class of policies that act on chosen parameters.

    Args:
        on: The parameters that it acts on: a glob over names (``"encoder.*"``), a module class, a predicate
            ``(name, parameter) -> bool``, or a list of these; see :func:`~lightning_optim.base.select`. Each base class
            documents what ``None`` means.
        exclude: The parameters that are left out, in the same terms.

    Raises:
        ValueError: If ``on`` or ``exclude`` is not one of these.
    """

    on: Selectors = None
    exclude: Selectors = None

    def __init__(self, on: Selectors = None, exclude: Selectors = None) -> None:
        self.on, self.exclude = check_selectors("on", on), check_selectors("exclude", exclude)

    @property
    def log_name(self) -> str:
        """The name of its logged value: the class in lower case."""
        return type(self).__name__.lower()


P = TypeVar("P", bound=Policy)


class PerOptimizer(Generic[P]):
    """Copies of some policies, one for each optimizer, made when they are first asked for.

    So a state may be loaded before the optimizers exist.

    Args:
        policies: The policies, which stay as they are.
    """

    def __init__(self, policies: Sequence[P]) -> None:
        self._template = list(policies)
        self._copies: list[list[P]] = []
        self._module: weakref.ref[nn.Module] | None = None

    def name_weights(self, module: nn.Module) -> None:
        """Save and load tensors beside weights by the names of a module, which is not kept alive."""
        self._module = weakref.ref(module)
        for policy in itertools.chain(*self._copies):
            policy.name_weights(module)

    def __getitem__(self, index: int) -> list[P]:
        while len(self._copies) <= index:
            self._copies.append([copy.deepcopy(policy) for policy in self._template])  # a policy listed twice is two
            for policy in self._copies[-1]:
                policy.copy_index = len(self._copies) - 1
                if self._module is not None and (module := self._module()) is not None:
                    policy.name_weights(module)
        return self._copies[index]

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """Return the state of each policy, for each optimizer."""
        return [[policy.state_dict() for policy in policies] for policies in self._copies]

    def load_state_dict(self, state: list[list[dict[str, Any]]]) -> None:
        """Load what :meth:`state_dict` returned. Copies of which it has no state begin anew."""
        self._copies = []
        for index, states in enumerate(state):
            for policy, its_state in zip(self[index], states, strict=True):
                policy.load_state_dict(its_state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None}


def belongs_to(value: Any, instead_of: type | tuple[type, ...]) -> str:
    """Return the end of a message about a wrong argument: where a policy in it belongs, if there is one.

    Args:
        value: The argument, or a list of them.
        instead_of: The classes that are allowed.

    Example::

        >>> class Half(Policy):
        ...     used_in = "Halving({})"
        >>> belongs_to([Half()], instead_of=int)
        '; Half() belongs in Halving(Half())'
    """
    if isinstance(value, Policy) and value.used_in and not isinstance(value, instead_of):
        return f"; {value!r} belongs in {value.in_its_place}"
    if isinstance(value, list | tuple):
        return next(filter(None, (belongs_to(one, instead_of) for one in value)), "")
    if isinstance(value, type) and issubclass(value, Policy):
        return f"; {value.__name__} is a class, so write {value.__name__}(…)"
    return ""


def is_scheduled(value: Any) -> bool:
    """Return True if a value, or one in it, is a schedule that needs the length of the run."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(is_scheduled, value))
    return isinstance(value, Policy) and value.scheduled


def _stable(value: Any) -> str:
    """Return a text for ``value`` that holds no memory address."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_stable(item) for item in value)}]"
    if isinstance(value, Policy):
        return value.identity
    if isinstance(value, partial):
        return f"{_stable(value.func)}{value.args}{value.keywords}"
    return getattr(value, "__qualname__", None) or repr(value)
