"""Measure the largest tensor that one torch operation makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestAllocation(TorchDispatchMode):
    """Measure the size of the largest new outputs of one operation within the context.

    Attributes:
        megabytes: The size in 10^6 bytes.
    """

    megabytes = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        new = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known]
        self.megabytes = max(self.megabytes, sum(t.numel() * t.element_size() for t in new) / 1e6)
        return result
