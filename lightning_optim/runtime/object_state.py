"""Remember in memory what objects hold, such as a module or the state of an optimizer, and put it back in place."""

from __future__ import annotations

import argparse
import functools
import io
import mmap
import operator
import pathlib
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_optim.base import module_tensors, shards
from lightning_optim.base.module_registry import REGISTRIES
from lightning_optim.runtime.files.own_files import OwnFiles
from lightning_optim.runtime.lightning import Callback, LightningDataModule, Logger, Trainer
from lightning_optim.runtime.random_state import generator_state, is_generator, set_generator_state_
from lightning_optim.runtime.session import Session


class LeftAlone:
    """Mark a class whose objects an :class:`ObjectState` leaves alone where it finds them within another object."""


_NUMBERS: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None))
_CONSTANTS = (*_NUMBERS, range, slice, type, Enum, pathlib.PurePath, torch.dtype, torch.device, weakref.ref)
_CONSTANTS += (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_CONTAINERS = (dict, list, set, deque, bytearray)
# They have a state of their own, which a training step does not change, or which could not be put back.
_LEFT_ALONE: tuple[Any, ...] = (LeftAlone, Trainer, Session, OwnFiles, Callback, Logger, LightningDataModule)
_LEFT_ALONE += (Optimizer, DataLoader, Dataset, Sampler, io.IOBase)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_LIBRARIES = {"torch", "torchmetrics", "lightning", "pytorch_lightning", "numpy"}
_LIBRARIES |= set(sys.stdlib_module_names) - {"__main__"}
_PACKAGE = __name__.split(".")[0]


class _Record(Protocol):
    def restore_(self) -> bool:
        """Put back the value as it was; return True if that was possible."""


_Kind = TypeVar("_Kind", bound=_Record)


class ObjectState(LeftAlone):
    """Remember everything that some objects hold: tensors, plain attributes, and those of the objects within.

    For a module these are parameters, buffers and the attributes of all submodules. Plain attributes are numbers, text,
    tensors, arrays, random generators, lists, dictionaries and other containers, and objects that hold nothing else,
    such as a meter of losses. Torch's modules are found everywhere, also a metric in a dictionary.

    This process's part of each tensor is copied, the shard of a sharded one, without communication. No copy shares
    memory with the original.

    Args:
        objects: The objects by a name, which begins the names in :meth:`restore_`. FSDP2 modules are resharded.
        device: Device of the copies of tensors. Default: that of each tensor.
        with_package: True to include objects of this package within the objects, such as policies; else they are left
            alone, as those of torch and Lightning are.
    """

    def __init__(
        self, objects: Mapping[str, Any], device: torch.device | str | None = None, with_package: bool = False
    ) -> None:
        self._modules = [value for value in objects.values() if isinstance(value, nn.Module)]
        self._device, self._with_package = device, with_package
        self._reshard()
        self._records: list[tuple[str, _Record]] = []
        self._seen: set[int] = set()  # `id` of objects that are recorded
        self._plain: set[int] = set()  # `id` of objects that hold only values that can be put back
        # A queue and no recursion: objects that refer to one another like a linked list can be deeper than the stack.
        self._found: deque[tuple[Any, str]] = deque()
        for name, value in objects.items():
            if isinstance(value, (nn.Module, Tensor, *_CONTAINERS)):
                self._found.append((value, name))
            else:  # its kind is left alone where it is found within another object
                self._record_attributes(value, name)
        while self._found:
            self._record(*self._found.popleft())
        writable = [record for record in self._of_kind(_TensorRecord) if record.writable]
        self._written, self._values = [record.shard for record in writable], [record.values for record in writable]

    def watch(self) -> None:
        """Count, from here on, the items taken from iterators that are held as attributes: they cannot be put back."""
        for record in self._of_kind(_IteratorRecord):
            record.watch()

    def restore_(self) -> list[str]:
        """Put back everything that changed; return the names of what cannot be put back.

        Tensors get their values in place. Gradients are dropped.
        """
        self._reshard()
        with torch.no_grad():
            if self._written:
                # All of them: versions do not tell which changed, since `parameter.data = …` counts as no write, and to
                # compare values would wait for the device.
                torch._foreach_copy_(self._written, self._values)
            return [name for name, record in self._records if not record.restore_()]

    def set_gradients_aside(self) -> None:
        """Take the gradients away, so that new ones can be accumulated."""
        for record in self._of_kind(_TensorRecord):
            record.set_gradient_aside()

    def return_gradients(self) -> None:
        """Give back the gradients that were set aside."""
        for record in self._of_kind(_TensorRecord):
            record.return_gradient()

    def _of_kind(self, kind: type[_Kind]) -> list[_Kind]:
        return [record for _, record in self._records if isinstance(record, kind)]

    def _reshard(self) -> None:
        for module in self._modules:
            shards.reshard_(module)

    # ---- finding -----------------------------------------------------------------------------------------------------

    def _record(self, value: Any, name: str) -> None:
        if _is_constant(value) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            if not is_lazy(value) and not value.is_meta:
                self._add(value, name, _TensorRecord(value, self._device))
        elif _is_array(value):
            if not _is_file(value):
                self._add(value, name, _ArrayRecord(value))
        elif is_generator(value):
            self._add(value, name, _GeneratorRecord(value))
        elif isinstance(value, _CONTAINERS):
            self._record_container(value, name)
        elif isinstance(value, tuple | frozenset):
            self._found += [(item, f"{name}[{index}]") for index, item in enumerate(value)]
        elif isinstance(value, nn.Module) or (self._has_attributes(value) and self._is_plain(value)):
            self._record_attributes(value, name)
        elif self._has_attributes(value):
            self._add(value, f"{name} ({type(value).__name__})", _ObjectRecord(value))

    def _add(self, value: Any, name: str, record: _Record) -> None:
        self._seen.add(id(value))
        self._records.append((name, record))

    def _record_container(self, value: Any, name: str) -> None:
        self._add(value, name, _ContainerRecord(value))
        if isinstance(value, dict | list | deque) and not _only_numbers(_values(value)):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                # The state of an optimizer has tensors as keys, and printing one would wait for the device.
                self._find(value, key, item, f"{name}[{key!r}]" if isinstance(key, _NUMBERS) else name)
        if getattr(value, "__dict__", None):  # of a subclass
            self._record_attributes(value, name)

    def _record_attributes(self, owner: Any, name: str) -> None:
        attributes = vars(owner)
        self._seen.add(id(owner))
        self._add(attributes, name, _ContainerRecord(attributes))
        for key, item in list(attributes.items()):
            if isinstance(owner, nn.Module) and key in REGISTRIES:
                if isinstance(item, dict):
                    self._add(item, name, _ContainerRecord(item))
                self._found += [(its_value, f"{name}.{its_name}") for its_name, its_value in item.items()]
            else:
                self._find(attributes, key, item, f"{name}.{key}")

    def _find(self, holder: Any, key: Any, item: Any, name: str) -> None:
        iterates = not _is_constant(item) and isinstance(item, Iterator) and not isinstance(item, _LEFT_ALONE)
        if iterates and not (self._has_attributes(item) and self._is_plain(item)):
            self._add(item, name, _IteratorRecord(holder, key, item))
        else:
            self._found.append((item, name))

    def _has_attributes(self, value: Any) -> bool:
        """Return True for an object with attributes whose class is not of a library."""
        library = _library_of(value)
        known = library in _LIBRARIES or (library == _PACKAGE and not self._with_package)
        left_alone = isinstance(value, _LEFT_ALONE) or (known and not isinstance(value, _NAMESPACES))
        return not left_alone and hasattr(value, "__dict__")

    def _is_plain(self, value: Any) -> bool:
        """Return True if it holds nothing but values that can be put back: no lock, connection or process.

        Objects of this package count as such: everything else that they hold does not change in a step.
        """
        seen, waiting = set[int](), [value]
        while waiting:
            item = waiting.pop()
            if id(item) in self._plain or id(item) in seen or _is_constant(item):
                continue
            if isinstance(item, (Tensor, nn.Module, *_LEFT_ALONE)) or is_generator(item) or _is_array(item):
                continue
            seen.add(id(item))
            if isinstance(item, (*_CONTAINERS, tuple, frozenset)):
                waiting += [] if _only_numbers(_values(item)) else _values(item)
            elif self._has_attributes(item):
                waiting += [] if _library_of(item) == _PACKAGE else vars(item).values()
            else:
                return False
        self._plain |= seen
        return True


def _is_constant(value: Any) -> bool:
    # The class of a proxy cannot be read if its object is gone.
    import numpy

    return type(value) in weakref.ProxyTypes or isinstance(value, (*_CONSTANTS, numpy.generic))


def _only_numbers(values: Any) -> bool:
    """Return True if it holds numbers and text only. Asking each of a million numbers would take a second."""
    return set(map(type, values)).issubset(_NUMBERS)


def _values(container: Any) -> Any:
    return container.values() if isinstance(container, dict) else container


def _library_of(value: Any) -> str:
    return str(value.__class__.__module__).split(".")[0]


def _is_array(value: Any) -> bool:
    import numpy

    return isinstance(value, numpy.ndarray)


def _is_file(array: Any) -> bool:
    """Return True if the values lie in a mapped file, which may be far larger than memory."""
    owner = array
    while _is_array(owner):
        owner = owner.base
    return isinstance(owner, mmap.mmap)


# ---- records ---------------------------------------------------------------------------------------------------------


class _TensorRecord:
    """Remember storage, values and ``requires_grad`` of a tensor.

    Attributes:
        shard: The storage as a tensor with a version counter of its own, so that a graph that saved the tensor is still
            good after the values were put back; it stays known if ``tensor.data`` is assigned.
        writable: True if values can be copied into it.
        values: A copy of the values, if they can.
    """

    def __init__(self, tensor: Tensor, device: torch.device | str | None) -> None:
        self.tensor, self.requires_grad = tensor, tensor.requires_grad
        self.grad: Tensor | None = None
        self.data = tensor.data
        (self.shard,) = shards.local_shards([self.data])
        self.writable = module_tensors.is_writable(self.shard) and not self.shard.is_inference()
        self.values = self.shard.to(device or self.shard.device, copy=True) if self.writable else self.shard
        self.version = shards.version(tensor)

    def restore_(self) -> bool:
        """Put back everything but the values of a writable tensor: all tensors' values are written together."""
        tensor = self.tensor
        (now,) = shards.local_shards([tensor.data])
        if _place(now) != _place(self.shard):
            tensor.data = self.data
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not None:
                tensor.grad = None
        return self.writable or shards.version(tensor) == self.version

    def set_gradient_aside(self) -> None:
        if self.tensor.is_leaf and self.tensor.grad is not None:
            self.grad, self.tensor.grad = self.tensor.grad, None

    def return_gradient(self) -> None:
        if self.grad is not None:
            self.tensor.grad = self.grad


def _place(tensor: Tensor) -> tuple[Any, ...]:
    place = tensor.data_ptr() if tensor.layout is torch.strided else None
    return tensor.dtype, tensor.device, tensor.shape, place


class _ArrayRecord:
    """Remember the values of a NumPy array."""

    def __init__(self, array: Any) -> None:
        self.array, self.values = array, array.copy()

    def restore_(self) -> bool:
        if self.array.flags.writeable and self.array.shape == self.values.shape:
            self.array[...] = self.values
        return self.array.shape == self.values.shape


class _GeneratorRecord:
    """Remember the state of an object that draws random numbers."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.state = generator, generator_state(generator)

    def restore_(self) -> bool:
        set_generator_state_(self.generator, self.state)
        return True


class _ContainerRecord:
    """Remember the items of a container, to put them back into this same object, which other objects may hold too."""

    def __init__(self, container: Any) -> None:
        self.container = container
        # Copied as a plain container, since a subclass may do anything in its methods.
        self.items: Any = dict(container.items()) if isinstance(container, dict) else list(container)

    def restore_(self) -> bool:
        held = self.container
        if isinstance(held, dict):
            if not (same_objects(held, self.items) and same_objects(held.values(), self.items.values())):
                kind: Any = OrderedDict if isinstance(held, OrderedDict) else dict
                kind.clear(held)
                for key, item in self.items.items():
                    kind.__setitem__(held, key, item)
        elif isinstance(held, list):
            if not same_objects(held, self.items):
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


def same_objects(one: Collection[Any], other: Collection[Any]) -> bool:
    """Return True if both hold the very same objects, in one order."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


class _ObjectRecord:
    """Notice changes of an object's attributes. It is not put back, since it holds more than values."""

    def __init__(self, value: Any) -> None:
        self.value, self.seen = value, self._look(value)

    @staticmethod
    def _look(value: Any) -> dict[str, tuple[Any, int]]:
        return {name: (item, len(item) if isinstance(item, _CONTAINERS) else 0) for name, item in vars(value).items()}

    def restore_(self) -> bool:
        now = self._look(self.value)
        return now.keys() == self.seen.keys() and all(
            item is now[name][0] and size == now[name][1] for name, (item, size) in self.seen.items()
        )


class _IteratorRecord:
    """Notice items that are taken from an iterator in an attribute, which cannot be undone."""

    def __init__(self, holder: Any, key: Any, iterator: Iterator[Any]) -> None:
        self.holder, self.key, self.counting = holder, key, _CountingIterator(iterator)

    def watch(self) -> None:
        # Its holder is a dictionary or a list, which gets the iterator itself again when it is put back.
        self.holder[self.key] = self.counting

    def restore_(self) -> bool:
        return self.counting.count == 0


class _CountingIterator:
    """Replace an iterator, and count the items that are taken from it."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self.count = iterator, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.count += 1
        return next(self.iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)
