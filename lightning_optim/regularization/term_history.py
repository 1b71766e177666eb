"""Keep the values of penalties and the shares of zeros at the logged steps, and draw them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.base.ring_buffer import Ring
from lightning_optim.plotting import check_metric, finish, log_scale, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ZEROS = "regularization/zeros"
_SIZE = 1000
_MOST_NAMED = 11  # lines in the legend


class TermHistory:
    """Keep values by name at the last logged steps of one optimizer, on their device.

    Attributes:
        names: Names of the values, in the order in which they came.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._steps: deque[int] = deque(maxlen=_SIZE)
        self._rows = Ring(_SIZE)

    def append(self, step: int, values: dict[str, Tensor]) -> None:
        """Add the values of a step, which is counted from 1."""
        self.names += [name for name in values if name not in self.names]
        if len(values) < len(self.names):
            like = next(iter(values.values()))
            values = {name: like.new_tensor(torch.nan) for name in self.names} | values
        self._steps.append(step)
        self._rows.append(torch.stack([values[name].float() for name in self.names]))

    def values(self) -> tuple[list[int], dict[str, Tensor]]:
        """Return the steps, and the values of each name at them, NaN where there was none."""
        rows = self._rows.rows.cpu()
        return list(self._steps), {name: rows[:, place] for place, name in enumerate(self.names)}

    def state_dict(self) -> dict[str, Any]:
        """Return names, steps and values."""
        return {"names": list(self.names), "steps": list(self._steps), **self._rows.state_dict()}

    @staticmethod
    def loaded(state: dict[str, Any]) -> TermHistory:
        """Return the history of which :meth:`state_dict` returned ``state``."""
        history = TermHistory()
        history.names = list(state["names"])
        history._steps.extend(state["steps"])
        history._rows.load_state_dict(state)
        return history


def draw(history: TermHistory, kind: str | None, axes: Axes | None, of: str = "") -> tuple[Figure, Axes]:
    """Draw the values of the penalties in one panel, and the shares of zeros in another, as far as there are any.

    Args:
        history: The values.
        kind: ``"penalties"`` or ``"zeros"``; both by default.
        axes: Axes to draw on, which get the first of these.
        of: What the titles add to the words "on the weights", such as the optimizer where there are several.
    """
    steps, values = history.values()
    shares = {name: value for name, value in values.items() if name.startswith(ZEROS)}
    kinds = {"penalties": {name: value for name, value in values.items() if name not in shares}, "zeros": shares}
    drawn = [name for name, found in kinds.items() if found]
    if kind is not None:
        drawn = [check_metric(kind, drawn)]
    drawn = drawn[:1] if axes is not None else drawn
    figure, panel = panels(len(drawn), axes)
    for one, name in zip(panel, drawn, strict=True):
        _draw_values(one, steps, kinds[name])
        if name == "zeros":
            largest = max(float(value.nan_to_num(0.0).max()) for value in kinds[name].values())
            one.set_ylim(0.0, 1.0 if largest > 0.3 else None)  # small shares would lie on the x-axis
            finish(one, x="optimizer steps", y="share of zeros", title=f"Share of weights{of} that are exactly zero")
        else:
            names = [value.removeprefix("regularization/") for value in kinds[name]]
            title = f"Penalties on the weights{of}" if len(names) > 1 else f"Penalty on the weights{of}: {names[0]}"
            finish(one, x="optimizer steps", y="value, as of the loss", title=title)
    return figure, panel[-1]


def _draw_values(axes: Axes, steps: list[int], values: dict[str, Tensor]) -> None:
    places, named = torch.tensor(steps), _named_in_legend(values)
    for name, value in values.items():
        label = "all" if name == ZEROS else name.removeprefix(f"{ZEROS}/").removeprefix("regularization/")
        style = {"linewidth": 2.0} if name == ZEROS else {"linewidth": 1.0}
        if name not in named:
            label, style = f"_{label}", {"linewidth": 0.5, "alpha": 0.5}  # matplotlib leaves it out of the legend
        known = value.isfinite()
        axes.plot(places[known], value[known], marker=".", label=label, **style)  # type: ignore[arg-type]
    together = torch.cat([value[value.isfinite()] for value in values.values()])
    # Within one decade a linear axis is easier to read.
    if ZEROS not in values and bool((together > 0.0).all()) and bool(together.max() > 10.0 * together.min()):
        log_scale(axes)


def _named_in_legend(values: dict[str, Tensor]) -> set[str]:
    """Return the names for the legend: of many, those with the largest and the smallest last values."""
    if len(values) <= _MOST_NAMED:
        return set(values)
    by_last = sorted(values, key=lambda name: float(values[name][values[name].isfinite()][-1]))
    half = (_MOST_NAMED - 1) // 2
    return {*by_last[:half], *by_last[-half:], *values.keys() & {ZEROS}}
