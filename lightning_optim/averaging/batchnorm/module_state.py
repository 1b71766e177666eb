"""The state of a module in memory, all of it, so that the changes of a piece of the user's code can be undone."""

from __future__ import annotations

import argparse
import functools
import io
import mmap
import pathlib
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_optim.averaging.batchnorm.batches import generator_state, is_generator, set_generator_state_
from lightning_optim.averaging.training.averaged_tensors import same
from lightning_optim.base import module_tensors, shards
from lightning_optim.base.module_registry import REGISTRIES
from lightning_optim.runtime.lightning import Callback, LightningDataModule, Logger, Trainer

_NUMBERS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None))
_CONSTANTS = (*_NUMBERS, range, slice, type, Enum, pathlib.PurePath, torch.dtype, torch.device)
_CONSTANTS += (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_CONTAINERS = (dict, list, set, deque, bytearray)
# They have a state of their own, which a training step does not change, or which could not be put back.
_LEFT_ALONE = (Trainer, Callback, Logger, LightningDataModule, Optimizer, DataLoader, Dataset, Sampler, io.IOBase)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_LIBRARIES = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "numpy", "lightning_optim"}
_LIBRARIES |= set(sys.stdlib_module_names) - {"__main__"}


class _Record(Protocol):
    def put_back(self) -> bool:
        """Put back the value as it was; return whether it is."""


class ModuleState:
    """Everything that a module holds: parameters, buffers, gradients, and the plain attributes of all submodules.

    Plain are numbers, text, tensors, arrays, generators of random numbers, lists, dictionaries and other containers,
    and objects that hold nothing else, such as a meter of losses. Torch's modules are found wherever they lie, and so a
    metric in a dictionary too. From here on the parameters have no gradients, until :meth:`close`.

    Args:
        module: The module. Under FSDP2 it is put back to its shards, here and in :meth:`put_back`.
    """

    def __init__(self, module: nn.Module) -> None:
        shards.reshard_(module)
        self._module = module
        self._records: dict[int, tuple[str, _Record]] = {}
        self._data: set[int] = set()  # of objects that hold nothing but what can be put back
        # A queue and no recursion: what hangs together like a list of links can be deeper than Python's stack.
        self._found: deque[tuple[Any, str]] = deque([(module, "self")])
        while self._found:
            self._take_in(*self._found.popleft())
        writable = [r for _, r in self._records.values() if isinstance(r, _OfTensor) and r.writable]
        self._written, self._values = [r.ours for r in writable], [r.values for r in writable]

    def watch(self) -> None:
        """Look, from here on, at what cannot be put back: iterators that are held as attributes."""
        for _, record in self._records.values():
            if isinstance(record, _OfIterator):
                record.watch()

    def put_back(self) -> list[str]:
        """Put back whatever changed; return the names of what cannot be put back."""
        shards.reshard_(self._module)
        with torch.no_grad():
            if self._written:
                torch._foreach_copy_(self._written, self._values)  # to compare them would wait for the device
            return [name for name, record in self._records.values() if not record.put_back()]

    def close(self) -> None:
        """Give the parameters their gradients again."""
        for _, record in self._records.values():
            if isinstance(record, _OfTensor):
                record.close()

    # ---- finding -----------------------------------------------------------------------------------------------------

    def _take_in(self, value: Any, name: str) -> None:
        if _is_constant(value) or id(value) in self._records:
            return
        if isinstance(value, Tensor):
            if not is_lazy(value) and not value.is_meta:
                self._remember(value, name, _OfTensor(value))
        elif _is_array(value):
            if not _is_file(value):
                self._remember(value, name, _OfArray(value))
        elif is_generator(value):
            self._remember(value, name, _OfGenerator(value))
        elif isinstance(value, _CONTAINERS):
            self._take_in_container(value, name)
        elif isinstance(value, tuple | frozenset):
            self._found += [(item, f"{name}[{index}]") for index, item in enumerate(value)]
        elif isinstance(value, nn.Module) or (_has_attributes(value) and _is_data(value, self._data)):
            self._take_in_attributes(value, name)
        elif _has_attributes(value):
            self._remember(value, f"{name} ({type(value).__name__})", _OfObject(value))

    def _remember(self, value: Any, name: str, record: _Record) -> None:
        self._records[id(value)] = name, record

    def _take_in_container(self, value: Any, name: str) -> None:
        self._remember(value, name, _OfContainer(value))
        if isinstance(value, dict | list | deque) and not _only_numbers(_values(value)):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                self._find(value, key, item, f"{name}[{key!r}]")
        if getattr(value, "__dict__", None):  # of a subclass
            self._take_in_attributes(value, name)

    def _take_in_attributes(self, owner: Any, name: str) -> None:
        attributes = vars(owner)
        if not isinstance(owner, _CONTAINERS):
            self._remember(owner, name, _NOTHING)
        self._remember(attributes, name, _OfContainer(attributes))
        for key, item in list(attributes.items()):
            if isinstance(owner, nn.Module) and key in REGISTRIES:
                if isinstance(item, dict):
                    self._remember(item, name, _OfContainer(item))
                self._found += [(its_value, f"{name}.{its_name}") for its_name, its_value in item.items()]
            else:
                self._find(attributes, key, item, f"{name}.{key}")

    def _find(self, holder: Any, key: Any, item: Any, name: str) -> None:
        iterates = not _is_constant(item) and isinstance(item, Iterator) and not isinstance(item, _LEFT_ALONE)
        if iterates and not (_has_attributes(item) and _is_data(item, self._data)):
            self._remember(item, name, _OfIterator(holder, key, item))
        else:
            self._found.append((item, name))


def _is_constant(value: Any) -> bool:
    # A proxy may stand for an object that is gone: to ask it for its class is an error then.
    import numpy

    return type(value) in weakref.ProxyTypes or isinstance(value, (*_CONSTANTS, numpy.generic))


def _only_numbers(values: Any) -> bool:
    """Return whether there are only numbers and text in it: of a million of them, asking each would take a second."""
    return set(map(type, values)).issubset(_NUMBERS)


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _has_attributes(value: Any) -> bool:
    """Return whether it is an object with attributes, of a class of the user or of some third package."""
    library = str(value.__class__.__module__).split(".")[0] in _LIBRARIES
    known = isinstance(value, _LEFT_ALONE) or (library and not isinstance(value, _NAMESPACES))
    return not known and hasattr(value, "__dict__")


def _is_data(value: Any, known: set[int]) -> bool:
    """Return whether it holds nothing but values that can be put back: no lock, connection or process of anything.

    If so, the ``id`` of all that it holds is added to ``known``, which is not looked at again.
    """
    seen, waiting = set[int](), [value]
    while waiting:
        item = waiting.pop()
        if id(item) in known or id(item) in seen or _is_constant(item) or is_generator(item) or _is_array(item):
            continue
        if isinstance(item, (Tensor, nn.Module, *_LEFT_ALONE)):
            continue
        seen.add(id(item))
        if isinstance(item, (*_CONTAINERS, tuple, frozenset)):
            waiting += [] if _only_numbers(_values(item)) else _values(item)
        elif _has_attributes(item):
            waiting += vars(item).values()
        else:
            return False
    known |= seen
    return True


def _is_array(value: Any) -> bool:
    import numpy

    return isinstance(value, numpy.ndarray)


def _is_file(array: Any) -> bool:
    """Return whether the values lie in a mapped file, which may be far larger than memory."""
    owner = array
    while _is_array(owner):
        owner = owner.base
    return isinstance(owner, mmap.mmap)


# ---- what is remembered of a value -----------------------------------------------------------------------------------


class _Nothing:
    def put_back(self) -> bool:
        return True


_NOTHING = _Nothing()


class _OfTensor:
    """Storage, values, gradient and ``requires_grad`` of a tensor.

    Attributes:
        ours: The storage as a tensor with a version counter of its own, so that a graph that saved the tensor is still
            good after the values were put back; it stays known if somebody assigns ``tensor.data``.
        writable: Whether values can be copied into it.
        values: A copy of the values, if they can.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.requires_grad = tensor, tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        if self.grad is not None:
            tensor.grad = None  # what is added to it meanwhile goes to another one
        self.data = tensor.data
        (self.ours,) = shards.local_shards([self.data])
        self.writable = module_tensors.is_writable(self.ours) and not self.ours.is_inference()
        self.values = self.ours.clone() if self.writable else self.ours
        self.version = shards.version(tensor)

    def put_back(self) -> bool:
        """Put back all but the values of what is writable, which are written together with others."""
        tensor = self.tensor
        (now,) = shards.local_shards([tensor.data])
        if _place(now) != _place(self.ours):
            tensor.data = self.data
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not None:
                tensor.grad = None
        return self.writable or shards.version(tensor) == self.version

    def close(self) -> None:
        if self.grad is not None:
            self.tensor.grad = self.grad


def _place(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.data_ptr() if tensor.layout is torch.strided else None
    return tensor.dtype, tensor.device, tensor.shape, place


class _OfArray:
    """The values of a NumPy array."""

    def __init__(self, array: Any) -> None:
        self.array, self.values = array, array.copy()

    def put_back(self) -> bool:
        if self.array.flags.writeable and self.array.shape == self.values.shape:
            self.array[...] = self.values
        return self.array.shape == self.values.shape


class _OfGenerator:
    """The state of an object that draws random numbers."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.state = generator, generator_state(generator)

    def put_back(self) -> bool:
        set_generator_state_(self.generator, self.state)
        return True


class _OfContainer:
    """The items of a container, which are put back into this very object: others may hold it too."""

    def __init__(self, container: Any) -> None:
        self.container = container
        # A plain container, whatever a subclass does in its methods.
        self.items: Any = dict(container.items()) if isinstance(container, dict) else list(container)

    def put_back(self) -> bool:
        held = self.container
        if isinstance(held, dict):
            if not (same(held, self.items) and same(held.values(), self.items.values())):
                kind: Any = OrderedDict if isinstance(held, OrderedDict) else dict
                kind.clear(held)
                for key, item in self.items.items():
                    kind.__setitem__(held, key, item)
        elif isinstance(held, list):
            if not same(held, self.items):
                list.__setitem__(held, slice(None), self.items)
        elif isinstance(held, set):
            set.clear(held)
            set.update(held, self.items)
        elif isinstance(held, deque):
            deque.clear(held)
            deque.extend(held, self.items)
        else:
            held[:] = bytes(self.items)
        return True


class _OfObject:
    """The attributes of an object that is not put back, since it holds more than values: whether they changed."""

    def __init__(self, value: Any) -> None:
        self.value, self.seen = value, self._look(value)

    @staticmethod
    def _look(value: Any) -> dict[str, tuple[Any, int]]:
        sized: Callable[[Any], int] = lambda item: len(item) if isinstance(item, _CONTAINERS) else 0  # noqa: E731
        return {name: (item, sized(item)) for name, item in vars(value).items()}

    def put_back(self) -> bool:
        now = self._look(self.value)
        return now.keys() == self.seen.keys() and all(
            item is now[name][0] and size == now[name][1] for name, (item, size) in self.seen.items()
        )


class _OfIterator:
    """An iterator that is held as an attribute: whether it was advanced can be seen, and not be undone."""

    def __init__(self, holder: Any, key: Any, iterator: Iterator[Any]) -> None:
        self.holder, self.key, self.counting = holder, key, _Counting(iterator)

    def watch(self) -> None:
        # Its holder is a dictionary or a list, which gets the iterator itself again when it is put back.
        self.holder[self.key] = self.counting

    def put_back(self) -> bool:
        return self.counting.count == 0


class _Counting:
    """Replaces an iterator, and counts the items that are taken from it."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.count = iterator, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.count += 1
        return next(self.iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)
