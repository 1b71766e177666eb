"""`docs/logged.md` lists what a run with all callbacks logs, what the code can log, and what a fit prints."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lightning_optim
from lightning_optim import (
    L1,
    L2,
    SWA,
    ActivationRegularization,
    CheckpointAveraging,
    EarlyStopping,
    ElasticNet,
    ExactResume,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    Linear,
    ProximalL1,
    RegularizationMixin,
    ScheduledDropout,
    WeightAveraging,
    WeightRegularization,
)
from tests.harness import pages
from tests.harness.pages import ROOT, Classifier, given
from tests.lightning import PACKAGE, Callback, Logger, ModelCheckpoint, Trainer

PAGE = (ROOT / "docs" / "logged.md").read_text()
ROWS = [line.split("|")[1].strip().strip("`") for line in PAGE.splitlines() if line.startswith("| `")]


class Regularized(RegularizationMixin, Classifier):
    def regularization(self, batch: Any, outputs: Tensor) -> Tensor:
        return 0.01 * outputs.square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        outputs = self(x)
        loss = cross_entropy(outputs, y) + self.regularization_loss(batch, outputs)
        return loss * float("nan") if batch_idx == 3 and self.current_epoch == 1 else loss


class Two(Classifier):
    """Two optimizers, under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.encoder, self.head)]


class Names(Logger):
    """Collect the names that a run logs."""

    name, version = "names", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.found |= metrics.keys()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def logged(model: Classifier, callbacks: list[Callback], folder: Path) -> set[str]:
    """Return the names that our callbacks log in a run."""
    names, data = Names(), given()
    trainer = Trainer(
        max_epochs=3,
        callbacks=callbacks,
        logger=names,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    trainer.fit(model, data["train_loader"], data["val_loader"])
    found = names.found | set(trainer.callback_metrics)
    return found - {"epoch", "val_loss", "val_acc"}


def matches(row: str, name: str) -> bool:
    return re.fullmatch(re.sub(r"<\w+>", r"[^/]+", re.escape(row)), name) is not None


@pytest.fixture(scope="module")
def all_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("logged")
    callbacks = [
        WeightRegularization(
            [L1(1e-5), L2(1e-4), L2(1e-4, on="head.*"), ElasticNet(1e-5, 1e-5), ProximalL1(1e-3, on="head.*")]
        ),
        ScheduledDropout({"encoder.*": Linear(0.0, 0.1), "head.*": 0.1}),
        ActivationRegularization(L1(1e-5), on="encoder"),
        GradientAccumulation(2),
        GradientMonitor(level="parameter"),
        GradientClipping(0.5),
        WeightAveraging(SWA(), compare=True),
        EarlyStopping("val_loss", patience=3),
        ModelCheckpoint(folder, monitor="val_loss", save_top_k=2),
        CheckpointAveraging(top=2),
        ExactResume(),
    ]
    return logged(Regularized(), callbacks, folder)


def test_each_logged_name_has_a_row(all_names: set[str]) -> None:
    missing = {name for name in all_names if not any(matches(row, name) for row in ROWS)}
    assert not missing, f"docs/logged.md has no row for {missing}"
    assert "regularization/l2_2" in all_names


def test_each_row_is_logged(all_names: set[str]) -> None:
    assert len(ROWS) == len(set(ROWS))
    never = {row for row in ROWS if not any(matches(row, name) for name in all_names)}
    assert not never, f"a run with all callbacks logs no {never}"


def test_names_of_a_step_end_in_the_number_of_the_optimizer(tmp_path: Path) -> None:
    callbacks = [
        WeightRegularization(L2(1e-4)),
        ScheduledDropout({"*": Linear(0.0, 0.1)}),
        GradientMonitor(),
        GradientClipping(0.5),
        WeightAveraging(SWA(), compare=True),
    ]
    found = logged(Two(), callbacks, tmp_path)
    numbered = ("norm", "norm_clipped", "update_ratio", "share_clipped", "skipped")
    names = {f"gradients/{name}" for name in numbered} | {"regularization/l2"}
    assert found == {f"{name}/{index}" for name in names for index in (0, 1)} | {
        "regularization/dropout/*",
        "averaging/raw/val_loss",
        "averaging/raw/val_acc",
    }


def test_each_name_in_the_code_has_a_row() -> None:
    """A name that only a rare run logs is found in the source."""
    rooms = ("gradients/", "regularization/", "averaging/")
    for path in Path(lightning_optim.__file__).parent.rglob("*.py"):
        for name in names_in(ast.parse(path.read_text())):
            if name.startswith(rooms) and " " not in name and not name.endswith("/"):  # not the beginning of a name
                assert any(matches(row, name) for row in ROWS), (
                    f"{path.name} has {name}, and docs/logged.md no row for it"
                )


def names_in(tree: ast.AST) -> list[str]:
    """Return the strings of a module; what an f-string fills in is a letter."""
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    inside = {id(part) for node in formatted for part in node.values}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in inside]
    plain = [n.value for n in constants if isinstance(n.value, str)]
    filled = ["".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in node.values) for node in formatted]
    return plain + filled


def test_a_fit_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in pages.TRAINER.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO, logger=f"{PACKAGE}.callbacks.model_summary")
    page = ROOT / "docs" / "logged.md"
    pages.run(page, pages.blocks(page, "python"), given())
    printed = [re.sub(r"[\d.]+", "0", line) for message in caplog.messages for line in message.splitlines()]
    (shown,) = pages.blocks(page, "text")
    for line in shown.code.splitlines():
        assert re.sub(r"[\d.]+", "0", line) in printed, f"{line!r} is not among {printed}"
