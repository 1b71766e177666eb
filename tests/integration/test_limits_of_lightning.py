"""Combinations that Lightning itself refuses, once each: if it accepts one some day, the matrix must have its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import models, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group, JobFailed
from tests.integration.entry_fits import StatelessOptimizer, fit
from tests.lightning import MisconfigurationException, ModelCheckpoint, ModelParallelStrategy
from tests.registry import BY_NAME

STEPS = Cell("automatic", "32-true", "single", "1")


def test_several_optimizers_in_automatic_optimization() -> None:
    module = models.Model(Cell("two", "32-true", "single", "1"))
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        run.make_trainer(STEPS, []).fit(module)


def test_accumulation_flag_under_manual_optimization() -> None:
    module = models.ManualModel(Cell("manual", "32-true", "single", "1"))
    with pytest.raises(MisconfigurationException, match="Automatic gradient accumulation is not supported for manual"):
        run.make_trainer(STEPS, [], accumulate_grad_batches=2).fit(module)


def test_clipping_flag_under_manual_optimization() -> None:
    module = models.ManualModel(Cell("manual", "32-true", "single", "1"))
    with pytest.raises(MisconfigurationException, match="Automatic gradient clipping is not supported for manual"):
        run.make_trainer(STEPS, [], gradient_clip_val=1.0).fit(module)


def test_fp16_by_name_under_fsdp2() -> None:
    with pytest.raises(ValueError, match=r"does not support .*precision='16-mixed'"):
        run.make_trainer(STEPS, [], strategy=ModelParallelStrategy(), precision="16-mixed")


def resume_stateless(folder: Path) -> None:
    cell = Cell("automatic", "32-true", "fsdp2", "1")
    saver = ModelCheckpoint(folder, "one", every_n_train_steps=2, save_top_k=1)
    options: dict[str, Any] = {"callbacks": [], "extra": (saver,), "enable_checkpointing": True}
    fit(BY_NAME["plain"], cell, StatelessOptimizer, strategy=run.fsdp2(False), **options)
    resumed: dict[str, Any] = {"callbacks": [], "ckpt_path": saver.best_model_path}
    fit(BY_NAME["plain"], cell, StatelessOptimizer, strategy=run.fsdp2(False), **resumed)


def test_resume_of_a_stateless_optimizer_from_one_file_under_fsdp2(tmp_path: Path) -> None:
    with Group(2) as pair, pytest.raises(JobFailed, match="IndexError"):
        pair.run(resume_stateless, tmp_path)
