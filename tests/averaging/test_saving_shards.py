"""While a sharded module is saved, it holds the evaluated average, as a module of one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_optim import WeightAveraging
from tests.harness import models
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.harness.run import fsdp2
from tests.integration.entry_fits import KeepsHistory, differences, fit, prepare
from tests.registry import BY_NAME


class Exporting:
    """Trait: save at the end of a batch; keep the average of that moment and the weights in `on_save_checkpoint`."""

    path: Any = None
    exported: Any = None

    def on_train_batch_end(self: Any, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        if self.path and self.seen == 7:
            average = next(callback for callback in self.trainer.callbacks if isinstance(callback, WeightAveraging))
            with average.averaged_weights(self):
                self.average = models.full_weights(self)
            self.trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.exported = models.full_weights(self)


def exported(path: Path, distributed: bool) -> Any:
    """Return the weights of a sharded module while it is saved, and the results without and with saving; a job."""
    cell, ends = Cell("automatic", "32-true", "fsdp2", "1"), []
    for target in (None, path):
        fitted = prepare(BY_NAME["ema"], cell, Exporting, KeepsHistory, strategy=fsdp2(distributed))
        fitted.module.path = target
        fitted.trainer.fit(fitted.module)
        ends.append((fitted.outcome.raw, fitted.outcome.final, fitted.outcome.validations))
    return fitted.module.exported, fitted.module.average, ends


@pytest.mark.parametrize("distributed", [True, False])
def test_a_sharded_module_holds_the_average_while_it_is_saved(distributed: bool, group: Group, tmp_path: Path) -> None:
    for weights, average, (alone, saving) in group.run(exported, tmp_path / "one.ckpt", distributed):
        assert not differences(weights, average)
        assert differences(weights, alone[0]), "nothing to tell apart"
        assert not differences(alone, saving)
    resumed = group.run(resumed_from, tmp_path / "one.ckpt")
    assert not differences(resumed, [saving] * 2)


def resumed_from(path: Path) -> Any:
    """Return the results of a run that resumes from a checkpoint; a job."""
    cell = Cell("automatic", "32-true", "fsdp2", "1")
    outcome = fit(BY_NAME["ema"], cell, KeepsHistory, ckpt_path=path).outcome
    return outcome.raw, outcome.final, outcome.validations
