"""Say that Lightning's ``EarlyStopping`` stops by the same metric."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_optim.runtime.callback import OptimCallback
from lightning_optim.runtime.lightning import EarlyStopping, Trainer, rank_zero_warn
from lightning_optim.runtime.lightning.packages import package_of


def warn_of_second_stopping(monitors: Iterable[str], trainer: Trainer) -> None:
    """Warn if Lightning's callback monitors one of these metrics too: the run ends when the first of the two stops it.

    With another metric it is a second rule, and nothing is wrong.
    """
    for other in trainer.callbacks:
        if not isinstance(other, EarlyStopping) or isinstance(other, OptimCallback) or other.monitor not in monitors:
            continue
        rank_zero_warn(
            f"The EarlyStopping of `{package_of(other)}` (patience={other.patience}) monitors {other.monitor!r} too,"
            " and the run ends as soon as one of the two stops it: remove Lightning's, since the EarlyStopping of"
            " lightning_optim takes the same arguments."
        )
