"""Write the weights that the module holds after a fit."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.order import SessionCallback


def write_final_weights_(callbacks: Iterable[SessionCallback], pl_module: LightningModule) -> bool:
    """Let one callback write the weights that the module keeps; return False if none has any to write.

    It is called at ``on_fit_end``, after the last checkpoint. Only one writes, so that no callback overwrites the
    weights of another. The callbacks are asked in the order of their
    ``final_rank``, until one has weights to write: the mean of checkpoints (0), the best weights that were validated
    (1), the average that is evaluated (2), an average that is not (3). If there are none, the module keeps its raw
    weights.
    """
    ranked = [(callback.final_rank, callback) for callback in callbacks if callback.final_rank is not None]
    return any(callback.write_final_(pl_module) for _, callback in sorted(ranked, key=lambda pair: pair[0]))
