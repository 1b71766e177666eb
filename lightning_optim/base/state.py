"""Define the kinds of state that a policy declares with ``add_state``: how each begins, grows and is saved."""

from __future__ import annotations

import abc
import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from lightning_optim.base import module_tensors, shards
from lightning_optim.base.arguments import check_number
from lightning_optim.base.ring_buffer import Ring


class State(abc.ABC):
    """Base class of the kinds: handles the value that a policy holds in an attribute."""

    @abc.abstractmethod
    def first(self) -> Any:
        """Return the value at the start."""

    def reset(self, held: Any) -> Any:
        """Return the value at the start, in place of ``held``."""
        return self.first()

    @abc.abstractmethod
    def save(self, held: Any) -> Any:
        """Return ``held`` for a checkpoint, as tensors and plain values."""

    @abc.abstractmethod
    def load(self, saved: Any, held: Any) -> Any:
        """Return the value that was saved; ``held`` is the value at the start."""

    def units(self, held: Any) -> int:
        """Return the number of units of which ``held`` has a column."""
        return 0

    def grow(self, held: Any, units: int, like: Tensor) -> Any:
        """Return ``held`` with so many columns, on the device of ``like``."""
        return held

    def name_weights(self, held: Any, module: nn.Module) -> None:  # noqa: B027 most kinds hold no such tensors
        """Save and load tensors beside weights in ``held`` by the names of ``module``."""


class Value(State):
    """Hold a plain value: a number, text, ``None``, infinity, a list or a dictionary of these, or a tensor.

    Args:
        default: The value at the start.
    """

    def __init__(self, default: Any) -> None:
        self._default = default

    def first(self) -> Any:
        return copy.deepcopy(self._default)

    def save(self, held: Any) -> Any:
        return copy.deepcopy(held)

    def load(self, saved: Any, held: Any) -> Any:
        return copy.deepcopy(saved)


class PerUnit(State):
    """Hold a tensor with a column for each unit; see :func:`per_unit`."""

    def __init__(self, fill: float, rows: int | None) -> None:
        self._fill, self._shape = fill, () if rows is None else (rows,)

    def first(self) -> Tensor:
        return torch.full((*self._shape, 0), self._fill)

    def save(self, held: Tensor) -> Tensor:
        return held.clone()

    def load(self, saved: Tensor, held: Tensor) -> Tensor:
        return saved.clone()

    def units(self, held: Tensor) -> int:
        return held.shape[-1]

    def grow(self, held: Tensor, units: int, like: Tensor) -> Tensor:
        known = held.shape[-1]
        if not known:
            return like.new_full((*self._shape, units), self._fill)
        held = held.to(like.device)
        return held if known == units else pad(held, (0, units - known), value=self._fill)


class RingState(State):
    """Hold the last rows of numbers; see :func:`ring`."""

    def __init__(self, length: int) -> None:
        self._length = length

    def first(self) -> Ring:
        return Ring(self._length)

    def save(self, held: Ring) -> dict[str, Any]:
        return held.state_dict()

    def load(self, saved: dict[str, Any], held: Ring) -> Ring:
        held.load_state_dict(saved)
        return held

    def units(self, held: Ring) -> int:
        return held.width


class PerWeight(State):
    """Hold a tensor beside each weight; see :func:`per_weight`."""

    def __init__(self, init: Callable[[Tensor], Tensor]) -> None:
        self._init = init

    def first(self) -> WeightStates:
        return WeightStates(self._init)

    def reset(self, held: WeightStates) -> WeightStates:
        held.clear()
        return held

    def save(self, held: WeightStates) -> dict[str, Tensor]:
        return held.named()

    def load(self, saved: dict[str, Tensor], held: WeightStates) -> WeightStates:
        held.load(saved)
        return held

    def name_weights(self, held: WeightStates, module: nn.Module) -> None:
        held.name_weights(module)


class Nested(State):
    """Hold the states of other policies; see :func:`nested`."""

    def __init__(self, policies: list[Any]) -> None:
        self._policies = policies

    def first(self) -> list[Any]:
        return self._policies

    def reset(self, held: list[Any]) -> list[Any]:
        for policy in held:
            policy.reset()
        return held

    def save(self, held: list[Any]) -> list[Any]:
        return [[policy.identity, policy.state_dict()] for policy in held]

    def load(self, saved: list[Any], held: list[Any]) -> list[Any]:
        left = list(saved)
        for policy in held:
            found = next((entry for entry in left if entry[0] == policy.identity), None)
            if found is not None:
                left.remove(found)
                policy.load_state_dict(found[1])
        return held

    def name_weights(self, held: list[Any], module: nn.Module) -> None:
        for policy in held:
            policy.name_weights(module)


def per_unit(fill: float = 0.0, rows: int | None = None) -> State:
    """Declare a tensor with an entry for each unit: each gradient norm that a policy handles by itself.

    It has the device and dtype of the norms. It grows when there are more units, and never shrinks.

    Args:
        fill: The value of a new unit.
        rows: If given, the tensor has the shape ``[rows, units]``, else ``[units]``.
    """
    return PerUnit(fill, rows)


def ring(length: int) -> State:
    """Declare a history of the last rows, a :class:`~lightning_optim.base.Ring`; a row has an entry for each unit.

    Args:
        length: The number of rows that are kept, >= 1.
    """
    check_number("length", length, low=1, integer=True)
    return RingState(length)


def per_weight(init: Callable[[Tensor], Tensor] = torch.zeros_like) -> State:
    """Declare a live tensor beside each weight: ``self.<name>.of(weights)`` returns them in the weights' order.

    A tensor is made when its weight is seen for the first time, with the weight's placement. Checkpoints hold it by the
    weight's name, and shards as the weight is sharded. Saving copies nothing.

    Args:
        init: Makes the tensor from its weight, in the same shape and placement; a function that can be pickled.
    """
    return PerWeight(init)


def nested(policies: list[Any]) -> State:
    """Declare the states of other policies, which the attribute lists; each finds its own by its identity on loading.

    Args:
        policies: The policies.
    """
    return Nested(policies)


class WeightStates:
    """Hold one tensor beside each of some weights, which is found again by the weight itself.

    Args:
        init: Makes the tensor from its weight.

    Attributes:
        source: If it is set, a function of a weight's name and the weight that returns the whole tensor to begin with,
            or ``None`` for that of ``init``.

    Example::

        >>> weight = torch.ones(2)
        >>> momentum = WeightStates(torch.zeros_like)
        >>> momentum.of([weight])[0].add_(1.0)
        tensor([1., 1.])
        >>> momentum.of([weight])
        [tensor([1., 1.])]
    """

    source: Callable[[str, Tensor], Tensor | None] | None = None

    def __init__(self, init: Callable[[Tensor], Tensor]) -> None:
        self._init = init
        # By the weight's `id`: the weight, its name, the tensor. Weights are held, since a weak reference would keep
        # torch from moving them to another device.
        self._held: dict[int, tuple[Tensor, str, Tensor]] = {}
        self._loaded: dict[str, Tensor] = {}  # tensors of weights that were not seen yet
        self._count = 0  # number of weights seen, by which they are named without a module
        self._module: weakref.ref[nn.Module] | None = None

    def of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors beside these weights, live; they are made for weights that are new.

        Raises:
            ValueError: If a weight is no parameter of the module by which the weights are named, such as the rows of a
                weight whose gradient is sparse.
        """
        if not self._held.keys() >= set(map(id, weights)):
            self._add([weight for weight in weights if id(weight) not in self._held])
        return [self._held[id(weight)][2] for weight in weights]

    @torch.no_grad()
    def _add(self, weights: Sequence[Tensor]) -> None:
        names = self._names()
        if names is not None:
            self._held = {key: held for key, held in self._held.items() if key in names}
        for place, weight in enumerate(weights, start=self._count):
            if names is not None and id(weight) not in names:
                raise ValueError(
                    f"The policy keeps a tensor beside each weight, and a tensor of shape {tuple(weight.shape)} is no"
                    " parameter of the model, such as the rows of a weight with a sparse gradient: leave such weights"
                    " out with `exclude`."
                )
            name = str(place) if names is None else names[id(weight)]
            own = self._init(weight.detach())
            saved = self._loaded.pop(name, None)
            if saved is None and self.source is not None:
                saved = self.source(name, weight)
            if saved is not None and saved.shape == own.shape:
                shards.copy_(own, saved)
            self._held[id(weight)] = (weight, name, own)
        self._count += len(weights)

    def _names(self) -> dict[int, str] | None:
        module = None if self._module is None else self._module()
        if module is None:
            return None
        shards.reshard_(module)
        return {key: module_tensors.plain_name(name) for key, name in module_tensors.parameter_names(module).items()}

    def name_weights(self, module: nn.Module) -> None:
        """Name weights as the module does, from now on; it is not kept alive."""
        self._module = weakref.ref(module)

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the present names of their weights, live."""
        names = self._names()
        if names is None:
            return self._loaded | {name: own for _, name, own in self._held.values()}
        return self._loaded | {names[key]: own for key, (_, _, own) in self._held.items() if key in names}

    def load(self, named: dict[str, Tensor]) -> None:
        """Keep copies of tensors by name; :meth:`of` uses them when it sees a weight of this name."""
        self.clear()
        self._loaded = {name: tensor.detach().clone() for name, tensor in named.items()}

    def clear(self) -> None:
        """Forget all tensors."""
        self._held, self._loaded, self._count = {}, {}, 0

    def __getstate__(self) -> dict[str, Any]:
        """Return a copy's attributes: it holds the tensors by name, and neither the weights nor their module."""
        named = self.named().items()
        copies = {name: shards.gather_to_cpu(t) if isinstance(t, DTensor) else t.clone() for name, t in named}
        return {"_init": self._init, "_held": {}, "_loaded": copies, "_count": 0, "_module": None}
