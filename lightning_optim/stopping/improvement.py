"""Which of several checks was the best, on numbers that were logged."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from lightning_optim.base.arguments import check_number
from lightning_optim.base.policy import Policy
from lightning_optim.stopping.criteria import Metrics, checked, read, worst


class Best(Policy):
    r"""What "best" means for the weights that are kept: one metric, a weighted sum of several, or several by rank.

    Args:
        by: A metric's name; a dictionary of name to weight, for :math:`\sum_i a_i v_i`; or a list of names, of which a
            later one decides only where all before are equal.
        mode: ``"min"`` if less is better, ``"max"`` if more is; for a list of names also a list of modes. Default
            ``"min"``.

    Attributes:
        best: The best values so far, one for each rank; infinitely bad before the first.

    Raises:
        ValueError: If ``by`` or ``mode`` is none of these.

    Example::

        >>> best = Best({"loss": 1.0, "accuracy": -0.5})
        >>> best.better({"loss": 1.0, "accuracy": 0.5}), best.better({"loss": 1.0, "accuracy": 0.6})
        (True, True)
        >>> best = Best(["accuracy", "loss"], mode=["max", "min"])
        >>> best.better({"accuracy": 0.5, "loss": 1.0}), best.better({"accuracy": 0.5, "loss": 0.9})
        (True, True)
    """

    identity_args: ClassVar[tuple[str, ...]] = ("by", "mode")

    best: list[float]

    def __init__(self, by: str | dict[str, float] | list[str], mode: str | list[str] = "min") -> None:
        if not by or not isinstance(by, str | dict | list):
            raise ValueError(
                f"`by` must be a metric's name, a dictionary of name to weight or a list of names, got {by!r}"
            )
        for name, weight in by.items() if isinstance(by, dict) else ():
            check_number(f"by[{name!r}]", weight)
        ranks = len(by) if isinstance(by, list) else 1
        modes = mode if isinstance(mode, list) else [mode] * ranks
        if len(modes) != ranks:
            raise ValueError(f"`mode` must be one mode, or one for each name of `by`, got {mode!r} for {by!r}")
        self.by, self.mode = by, mode
        self._modes = [checked(one) for one in modes]
        self.reset()

    @property
    def monitors(self) -> tuple[str, ...]:
        """The names of the metrics that are read."""
        return (self.by,) if isinstance(self.by, str) else tuple(self.by)

    def better(self, metrics: Metrics) -> bool:
        """Whether these metrics are strictly better than the best so far, which they then become. NaN is never better.

        Raises:
            KeyError: If a metric is missing; the message names those that exist.
        """
        values = [float(read(metrics, name)) for name in self.monitors]
        if isinstance(self.by, dict):
            values = [sum(weight * value for weight, value in zip(self.by.values(), values, strict=True))]
        better = not any(math.isnan(value) for value in values) and self._cost(values) < self._cost(self.best)
        self.best = values if better else self.best
        return better

    def _cost(self, values: list[float]) -> list[float]:
        """What is less where it is better; lists compare by rank."""
        return [value if mode == "min" else -value for value, mode in zip(values, self._modes, strict=True)]

    def reset(self) -> None:
        """Forget everything, as before the first check."""
        self.best = [worst(mode) for mode in self._modes]

    def state_dict(self) -> dict[str, Any]:
        return {"best": list(self.best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = list(state["best"])
