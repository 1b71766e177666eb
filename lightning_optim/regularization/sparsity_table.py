"""Count the weights that are exactly zero, by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_optim.base.selection import Selectors, select
from lightning_optim.base.shards import reshard_, whole


@dataclass(frozen=True)
class LayerSparsity:
    """Hold the number of zeros of one parameter: a row of :class:`Sparsity`.

    Attributes:
        name: Name of the parameter.
        weights: Number of its elements.
        zeros: Number of elements that are exactly zero.
        rows: Number of its rows, each of which has the weights of one output: the length of its first dimension; 1 for
            a vector.
        zero_rows: Number of rows that are zero throughout, so that their outputs can be removed.
    """

    name: str
    weights: int
    zeros: int
    rows: int
    zero_rows: int

    @property
    def share(self) -> float:
        """Share of elements that are exactly zero, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Sparsity:
    """Hold the number of zeros of each parameter; prints as a table, and iterates over its rows.

    Attributes:
        rows: One :class:`LayerSparsity` for each parameter, in the model's order.
    """

    rows: tuple[LayerSparsity, ...]

    @staticmethod
    def of(named: Mapping[str, Tensor]) -> Sparsity:
        """Count the zeros of some tensors. With sharded ones it is a collective: call it on all ranks."""
        return Sparsity(tuple(_count(name, whole(tensor.detach())) for name, tensor in named.items()))

    @property
    def share(self) -> float:
        """Share of all elements together that are exactly zero, in [0, 1]."""
        weights = sum(row.weights for row in self.rows)
        return sum(row.zeros for row in self.rows) / weights if weights else 0.0

    @property
    def in_words(self) -> str:
        """The share in a few words, such as "90.2 % of 49,200 weights are zero"."""
        return f"{100.0 * self.share:.1f} % of {sum(row.weights for row in self.rows):,} weights are zero"

    def __iter__(self) -> Iterator[LayerSparsity]:
        return iter(self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "weights", "zeros", "share", "rows", "zero rows")]
        cells += [
            (one.name, f"{one.weights}", f"{one.zeros}", f"{one.share:.3f}", f"{one.rows}", f"{one.zero_rows}")
            for one in self.rows
        ]
        totals = [sum(getattr(one, name) for one in self.rows) for name in ("weights", "zeros", "rows", "zero_rows")]
        weights, zeros, rows, zero_rows = map(str, totals)
        cells.append(("all", weights, zeros, f"{self.share:.3f}", rows, zero_rows))
        first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = [
            [name.ljust(first), *(cell.rjust(width) for cell, width in zip(numbers, others, strict=True))]
            for name, *numbers in cells
        ]
        return "\n".join(map("  ".join, lines))


def _count(name: str, tensor: Tensor) -> LayerSparsity:
    kept = tensor != 0
    rows = kept.flatten(1).any(dim=1) if kept.ndim >= 2 else kept.any().reshape(1)
    weights = tensor.numel()
    return LayerSparsity(name, weights, weights - int(kept.sum()), len(rows), len(rows) - int(rows.sum()))


def sparsity(module: nn.Module, on: Selectors = None, exclude: Selectors = None) -> Sparsity:
    """Count the weights of a model that are exactly zero, by layer.

    ``print`` shows the result as a table; it iterates over its rows, one :class:`LayerSparsity` for each parameter.
    Rows of a parameter that are zero throughout belong to outputs that can be removed. Sharded parameters are gathered
    one at a time: call it on all ranks.

    Args:
        module: The model.
        on: The parameters that are counted: a glob over names, a module class, a predicate, or a list of these.
            Default: those with two dimensions or more.
        exclude: The parameters that are left out, in the same terms.

    Returns:
        The numbers of each parameter; ``share`` is the share of zeros of all together.

    Raises:
        ValueError: If a glob or a class matches nothing.

    Example::

        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     model[0].weight[0] = 0.0
        >>> print(sparsity(model))
        parameter  weights  zeros  share  rows  zero rows
        0.weight         8      4  0.500     2          1
        1.weight         4      0  0.000     2          0
        all             12      4  0.333     4          1
    """
    reshard_(module)
    return Sparsity.of(select(module, on, exclude))
