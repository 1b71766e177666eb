"""Cells of the matrix: all 81, arrays of nine that hold every pair of levels, and the settings of a cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

Kind = Literal["automatic", "manual", "two"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Strategy = Literal["single", "ddp", "fsdp2"]
Windows = Literal["1", "4", "4short"]

EPOCHS = 2
MOMENTUM = 0.9
INIT_SCALE = 2.0**10


@dataclass(frozen=True)
class Cell:
    """One combination of model, precision, strategy and accumulation."""

    kind: Kind
    precision: Precision
    strategy: Strategy
    windows: Windows

    def __str__(self) -> str:
        return f"{self.kind}-{self.precision}-{self.strategy}-{self.windows}"

    @property
    def optimizers(self) -> int:
        return 2 if self.kind == "two" else 1

    @property
    def processes(self) -> int:
        return 1 if self.strategy == "single" else 2

    @property
    def sharded(self) -> tuple[int, ...]:
        """Dimensions along which tensors are sharded."""
        return (0,) if self.strategy == "fsdp2" else ()

    @property
    def accumulation(self) -> int:
        """Number of micro-batches in a full window."""
        return 1 if self.windows == "1" else 4

    @property
    def batches(self) -> int:
        """Number of micro-batches in an epoch; with ``4short`` the last window has two in place of four."""
        return {"1": 4, "4": 8, "4short": 6}[self.windows]

    @property
    def validate_every(self) -> int:
        """Number of micro-batches between validations: half an epoch, with ``4short`` within an open window."""
        return self.batches // 2

    @property
    def lr(self) -> float:
        # The cells without accumulation take twice the steps. With a smaller rate the weights of all cells change by a
        # similar amount, so that one strength of a technique suits them all. No weight comes near zero, where its sign
        # could differ.
        return 0.005 if self.windows == "1" else 0.01

    @property
    def tolerance(self) -> float:
        """Largest ``|a - b| / (1 + |b|)`` between a weight of the fit and of the reference loop.

        In 16 bit two processes round the gradients of half batches, and the loop those of whole batches. This was
        measured to change a weight by 1.1e-4 in bfloat16 and by 1.1e-5 in float16.
        """
        return {"32-true": 1e-6, "bf16-mixed": 4e-4, "16-mixed": 5e-5}[self.precision]

    @property
    def value_tolerance(self) -> float:
        """Tolerance of losses and logged values, which sum the roundings of many numbers."""
        return 4 * self.tolerance

    @property
    def whole(self) -> Cell:
        """Cell of the reference loop, which runs once for all strategies."""
        return replace(self, strategy="single")


LEVELS = (get_args(Kind), get_args(Precision), get_args(Strategy), get_args(Windows))
CELLS = tuple(Cell(*levels) for levels in product(*LEVELS))


def orthogonal_array(turn: int) -> tuple[Cell, ...]:
    """Return nine cells in which every pair of levels of two factors occurs once; nine turns give all 81 cells.

    With the levels as numbers modulo 3 these are the cells (a, b, a + b + c, a + 2b + d) for all a and b, and ``turn``
    chooses c and d.
    """
    c, d = turn % 3, turn // 3 % 3
    rows = [(a, b, (a + b + c) % 3, (a + 2 * b + d) % 3) for a, b in product(range(3), repeat=2)]
    return tuple(Cell(*(names[level] for names, level in zip(LEVELS, row, strict=True))) for row in rows)
