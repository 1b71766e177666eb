"""Draw the gradient norms of an optimizer before and after clipping, and the bound that was in force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.plotting import finish, ink, legend_beside, log_scale, outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Norms:
    """Hold the norms of the last steps of one optimizer: vectors with an entry for each step, NaN where unknown.

    Attributes:
        optimizer: Words for the optimizer, such as ``"optimizer 0 (SGD)"``.
        norm_type: Exponent of the norm.
        last: Number of the last step, counted from 1.
        before: Norm before clipping.
        after: Norm after clipping, of the logged steps.
        bound: Bound on the norm that was in force; infinite where there was none.
        clipped: 1 for a step that was clipped, 0 for one that was not.
    """

    optimizer: str
    norm_type: float
    last: int
    before: Tensor
    after: Tensor
    bound: Tensor
    clipped: Tensor

    @property
    def steps(self) -> Tensor:
        return torch.arange(self.last - len(self.before) + 1, self.last + 1)

    @property
    def share_clipped(self) -> str:
        """Words for the share of steps that were clipped, or only the number of steps if it is not known."""
        share = float(self.clipped.nanmean())
        steps = f"{len(self.before):,} steps"
        return steps if math.isnan(share) else f"{100.0 * share:.0f} % of {steps} clipped"

    @property
    def in_words(self) -> str:
        """Words for the usual size of the norms before clipping, with the number of steps if there were more before."""
        finite = self.before[self.before.isfinite()].double()
        if not len(finite):
            return ""
        median, high = (float(torch.quantile(finite, share)) for share in (0.5, 0.9))
        steps = f" in the last {len(self.before):,} steps" if len(self.before) < self.last else ""
        return f"{steps}: median {median:.3g}, 90th percentile {high:.3g}"

    @property
    def is_clipped(self) -> bool:
        """True if clipping policies acted, as far as it is known."""
        return bool(self.clipped.isfinite().any() or self.bound.isfinite().any())


def name_of_norm(norm_type: float) -> str:
    """Return words for a norm.

    Example::

        >>> name_of_norm(2.0), name_of_norm(math.inf)
        ('2-norm', 'largest absolute value')
    """
    return "largest absolute value" if math.isinf(norm_type) else f"{norm_type:g}-norm"


def draw(axes: Axes, norms: Sequence[Norms], suggestion: tuple[str, float] | None) -> None:
    """Draw the norms of one optimizer in one colour for each quantity, or of several in one colour for each optimizer.

    Args:
        axes: The axes.
        norms: The norms of each optimizer.
        suggestion: Words for a suggested bound, and the bound, which is drawn as a line.
    """
    single = len(norms) == 1
    for one in norms:
        _draw_optimizer(axes, one, single)
    if suggestion is not None:
        words, bound = suggestion
        axes.axhline(bound, color=ink(axes), linestyle=":", linewidth=1.2, label=f"{words}, {bound:.3g}")
    log_scale(axes)
    kinds = {name_of_norm(one.norm_type) for one in norms}
    unit = f" ({next(iter(kinds))})" if len(kinds) == 1 else ""
    if single:
        title = f"Gradient norms of {norms[0].optimizer}: {norms[0].share_clipped}"
    else:
        title = f"Gradient norms of {len(norms)} optimizers"
    finish(axes, x="optimizer steps", y=f"norm of the gradients{unit}", title=title)
    if axes.get_legend() is not None:
        legend_beside(axes)


def _draw_optimizer(axes: Axes, norms: Norms, single: bool) -> None:
    prefix = "" if single else f"{norms.optimizer}, "
    words = "before clipping" if norms.is_clipped else "each step"
    (line,) = axes.plot(norms.steps, norms.before, linewidth=0.8, label=f"{prefix}{words}", alpha=0.8)
    # With several optimizers all that belongs to one has one colour.
    color: dict[str, Any] = {} if single else {"color": line.get_color()}
    logged = norms.after.isfinite()
    if logged.any() and norms.clipped.isfinite().any():
        words = "logged steps" if single else norms.share_clipped
        label = f"{prefix}after clipping ({words})"
        axes.plot(norms.steps[logged], norms.after[logged], ".", markersize=9.0, label=label, **color)
    finite = norms.bound.isfinite()
    if finite.any():
        first, last = (float(norms.bound[finite][place]) for place in (0, -1))
        numbers = f"{first:.3g}" if bool((norms.bound[finite] == first).all()) else f"{first:.3g} to {last:.3g}"
        shown = torch.where(finite, norms.bound, math.nan)
        style = {"color": ink(axes), "linewidth": 1.0} if single else {**color, "linewidth": 1.0, "linestyle": "--"}
        style |= {"zorder": 3.0, **outline(axes)}  # where all steps are clipped, the points are all on the bound
        axes.plot(norms.steps, shown, drawstyle="steps-mid", label=f"{prefix}bound in force, {numbers}", **style)
