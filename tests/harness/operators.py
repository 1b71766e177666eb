"""Watch the operators that torch runs: which make the host wait for the device, and how much memory they ask for."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero")


class Operators(TorchDispatchMode):
    """Count operators, and measure the tensors that they make.

    Attributes:
        on: False while nothing is to be counted or measured.
        count: Number of operators.
        host_reads: Number of operators that return a value to the host, by name.
        largest: Number of elements of the largest new outputs of one operator. Views of its inputs are not new.
        largest_bytes: Size of the largest new outputs of one operator.
        largest_from: Name of the operator with the largest number of elements.
        peak: Largest number of new elements that existed at once.
    """

    def __init__(self, on: bool = True) -> None:
        super().__init__()
        self.on = on
        self.count = 0
        self.host_reads: Counter[str] = Counter()
        self.largest, self.largest_bytes, self.largest_from = 0, 0, ""
        self.peak = self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.on:
            return func(*args, **(kwargs or {}))
        # Before the call: an operator may give an input another storage.
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        self.count += 1
        self.host_reads[name] += name in HOST_READS
        new = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known]
        self._measure(name, new)
        return output

    def _measure(self, name: str, new: list[Tensor]) -> None:
        size = sum(tensor.numel() for tensor in new)
        if size > self.largest:
            self.largest, self.largest_from = size, name
        self.largest_bytes = max(self.largest_bytes, sum(tensor.numel() * tensor.element_size() for tensor in new))
        for tensor in new:
            self._add(tensor.numel())
            weakref.finalize(tensor, self._add, -tensor.numel())

    def _add(self, elements: int) -> None:
        self._live += elements
        self.peak = max(self.peak, self._live)
