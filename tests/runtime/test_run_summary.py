"""The lines at the start and the end of a fit: what is on, in the order in which it acts, and what was done."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import (
    EMA,
    L1,
    L2,
    LAWA,
    SWA,
    AllOf,
    CheckpointAveraging,
    ClipByNorm,
    ClipByValue,
    EarlyStopping,
    EMAWeightAveraging,
    ExactResume,
    GradientAccumulation,
    GradientClipping,
    GradientMonitor,
    Linear,
    OptimCallback,
    Plateau,
    ProximalL1,
    ScheduledDropout,
    StochasticWeightAveraging,
    TargetBatchSize,
    WeightAveraging,
    WeightRegularization,
)
from tests.harness.process_group import Group
from tests.harness.run import LivingEnvironment
from tests.lightning import PACKAGE, Callback, DDPStrategy, LightningModule, ModelCheckpoint, Trainer

LOGGER = f"{PACKAGE}.callbacks.model_summary"


class Classifier(LightningModule):
    """A small classifier whose validation loss follows a script, if there is one."""

    def __init__(self, losses: list[float] | None = None, optimizers: int = 1, spike: int | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.losses, self.count, self.spike = losses, optimizers, spike

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.count > 1:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
            return None
        loss = self.loss(batch)
        return loss * float("nan") if batch_idx == self.spike else loss

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) if self.losses is None else self.losses[self.current_epoch])
        self.log("val_error", 0.5)

    def configure_optimizers(self) -> Any:
        self.automatic_optimization = self.count == 1
        layers = [self.net] if self.count == 1 else [self.net[0]] * self.count
        made = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]
        return made[0] if self.count == 1 else made


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(16, 4), torch.arange(16) % 3), batch_size=4)


class Said(logging.Handler):
    """What is logged where Lightning logs its model summary, without that summary."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "Total params" not in (message := record.getMessage()):
            self.messages.append(message)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Messages that are logged in a test."""
    logger, handler = logging.getLogger(LOGGER), Said()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def fit(callbacks: list[Callback], model: Classifier | None = None, ckpt_path: Any = None, **arguments: Any) -> Trainer:
    defaults = {"max_epochs": 3, "enable_checkpointing": False, "num_sanity_val_steps": 0, "logger": False}
    defaults |= {"accelerator": "cpu", "enable_progress_bar": False}
    trainer = Trainer(callbacks=callbacks, **{**defaults, **arguments})
    trainer.fit(model or Classifier(), loader(), loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("best_by", "by"),
    [
        (["val_loss", "val_error"], "val_loss, val_error"),
        ({"val_loss": 1.0, "val_error": -0.0}, "1 * val_loss - 0 * val_error"),
    ],
)
def test_by_what_the_best_is_the_best(best_by: Any, by: str, said: list[str]) -> None:
    criterion = AllOf([Plateau("val_loss"), Plateau("val_error")])
    stop = EarlyStopping(criterion, best_by=best_by)
    fit([stop], Classifier(losses=[0.3, 0.2104, 0.4]))
    start, end = said
    assert start.endswith(f", best by {by} kept in memory")
    error = f"{stop.history[1]['val_error']:.4g}"
    assert end == f"restored validation 2 of 3, best by {by}: val_loss 0.2104, val_error {error}"
    said.clear()
    fit([EarlyStopping("val_loss", best_by="val_error", restore_best=False)], Classifier(losses=[0.3, 0.2104, 0.4]))
    assert "best at validation " in said[1] and ", best by val_error: val_loss 0." in said[1]


def test_what_is_on_and_what_was_done(said: list[str]) -> None:
    callbacks = [
        EarlyStopping("val_loss", patience=2),
        WeightAveraging(EMA(0.9, warmup=None)),
        GradientClipping(0.01),
        WeightRegularization([L2(1e-4), ProximalL1(1e-6)]),
        GradientAccumulation(2),
    ]
    fit(callbacks, Classifier(losses=[0.3, 0.2104, 0.4]))
    start, end = said
    assert start.splitlines() == [
        "optimizer 0 (SGD, 4 tensors): accumulate 2 → L2(0.0001) on 2 tensors → clip norm 0.01 → ProximalL1(1e-06) on 2"
        " tensors → average EMA(0.9, warmup=None)",
        "stop on val_loss, patience 2, best kept in memory",
    ]
    best = "best val_loss 0.2104 at validation 2 of 3, restored (averaged weights)"
    zeros = "0.0 % of 56 weights are zero"  # an average has no exact zeros
    assert end == f"{best} · {zeros} · 0 of 6 steps skipped, 100 % clipped"


def test_skipped_steps_and_the_average_are_reported(said: list[str]) -> None:
    callbacks = [GradientClipping(1e6), WeightAveraging(EMA(0.9, warmup=None))]
    fit(callbacks, Classifier(spike=1))
    _, end = said
    assert end == "the module holds the average EMA(0.9, warmup=None) of 9 updates · 3 of 12 steps skipped, 0 % clipped"


@pytest.mark.parametrize(
    ("callbacks", "optimizers", "end"),
    [
        ([WeightAveraging(SWA(), start=11)], 1, "the module holds the average SWA() of 1 update"),
        ([WeightAveraging(SWA(), start=10)], 2, "the module holds the average SWA() of 2 and 2 updates"),
        (
            [WeightAveraging(SWA(), apply_at_end=False)],
            1,
            "the average SWA() of 12 updates is in `averaged_weights(model)`, raw weights are in the module",
        ),
        (
            [WeightAveraging(SWA()), WeightAveraging(LAWA(2), evaluate=False, apply_at_end=False)],
            1,
            "the module holds the average SWA() of 12 updates",
        ),
    ],
)
def test_where_an_average_is(callbacks: list[Callback], optimizers: int, end: str, said: list[str]) -> None:
    fit(callbacks, Classifier(optimizers=optimizers))
    assert said[1] == end


class Own(OptimCallback):
    """Act after a step."""

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        pass


class Told(Own):
    """Describe itself."""

    def describe_step(self, index: int) -> tuple[str, str]:
        return "look", f"act on {index}"

    def describe_run(self) -> str:
        return "a rule"

    def report(self) -> str:
        return "done"


@pytest.mark.parametrize(
    ("callbacks", "lines"),
    [
        ([GradientMonitor()], ["measure norms"]),
        ([GradientAccumulation({0: 2, 1: 4}, weight_by="sample")], ["accumulate {0: 2, 1: 4}, weighted by sample"]),
        ([GradientAccumulation(TargetBatchSize(14))], ["accumulate 4 (16 samples)"]),
        ([GradientAccumulation(2, weight_by=lambda batch: 1)], ["accumulate 2, weighted by a function"]),
        ([GradientAccumulation(2, weight_by=len)], ["accumulate 2, weighted by len"]),
        ([GradientClipping([ClipByValue(0.5), 1.0])], ["clip value 0.5 → clip norm 1.0"]),
        ([GradientClipping(ClipByNorm(Linear(1.0, 0.5)))], ["clip norm Linear(1.0, 0.5)"]),
        ([GradientClipping(ClipByNorm(1.0, scope="tensor"))], ["clip ClipByNorm(1.0, scope='tensor')"]),
        ([GradientClipping({"net.0.*": 1.0, "*": 2.0})], ["clip norm 1.0 on net.0.*, clip norm 2.0 on *"]),
        ([WeightAveraging(SWA(), start=0.5, every="epoch")], ["average SWA() every epoch from step 9 on"]),
        (
            [WeightAveraging(SWA(), start=2, every=3, evaluate=False)],
            ["average SWA() every 3 steps from step 3 on (not evaluated)"],
        ),
        ([EMAWeightAveraging(update_starting_at_epoch=1)], ["average EMA(0.999, warmup=None) from epoch 1 on"]),
        ([StochasticWeightAveraging(swa_epoch_start=2)], ["average SWA() every epoch from epoch 1 on"]),
        ([Own()], ["Own()"]),
        (
            [Told(), WeightRegularization(L1(1e-5, on="net.0.weight"))],
            ["look → L1(1e-05, on='net.0.weight') on 1 tensor → act on 0", "a rule"],
        ),
        ([ScheduledDropout({"net.0": 0.1}, insert=True)], [None, "dropout 0.1 on net.0 (1 layer)"]),
        ([ExactResume()], [None, "exact resume from checkpoints"]),
        (
            [EarlyStopping(AllOf([Plateau("val_loss"), Plateau("val_error")]), best_by="val_loss", restore_best=False)],
            [None, "stop on AllOf([Plateau('val_loss'), Plateau('val_error')]), best by val_loss not kept"],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) and not isinstance(value[0], Callback) else repr(value),
)
def test_lines_of_each_callback(callbacks: list[Callback], lines: list[str], said: list[str]) -> None:
    fit(callbacks, max_epochs=4)
    chain, *rules = lines
    assert said[0].splitlines() == ([f"optimizer 0 (SGD, 4 tensors): {chain}"] if chain else []) + rules


def test_each_optimizer_has_a_line_and_there_are_at_most_eight(said: list[str]) -> None:
    fit([GradientClipping({1: 1.0}), EarlyStopping("val_loss")], Classifier(optimizers=2))
    start, end = said
    assert start.splitlines() == [
        "optimizer 1 (SGD, 2 tensors): clip norm 1.0",
        "stop on val_loss, patience 3, best kept in memory",
    ]
    assert "optimizer 0: 0 of 12 steps skipped" in end and "; optimizer 1: 0 of 12 steps skipped, " in end
    fit([GradientClipping(1.0), EarlyStopping("val_loss"), Told()], Classifier(optimizers=12))
    lines = said[2].splitlines()
    assert len(lines) == 8
    assert lines[6:] == ["… and 6 more optimizers", "stop on val_loss, patience 3, best kept in memory · a rule"]


@pytest.mark.parametrize(
    ("callbacks", "arguments"),
    [
        ([GradientClipping(1.0, summary=False), EarlyStopping("val_loss")], {}),
        ([GradientClipping(1.0), EarlyStopping("val_loss", summary=False)], {}),
        ([GradientClipping(1.0)], {"enable_model_summary": False}),
    ],
)
def test_it_can_be_turned_off(callbacks: list[Callback], arguments: dict[str, Any], said: list[str]) -> None:
    fit(callbacks, **arguments)
    assert not said


def test_barebones_says_nothing(said: list[str]) -> None:
    arguments: dict[str, Any] = {"max_steps": 1, "barebones": True, "accelerator": "cpu"}
    Trainer(callbacks=[GradientClipping(1.0)], **arguments).fit(Classifier(), loader())
    assert not said


def test_a_resumed_run_counts_on_and_an_ended_one_says_nothing(said: list[str], tmp_path) -> None:
    def callbacks() -> list[Callback]:
        return [GradientClipping(0.01), EarlyStopping("val_loss")]

    losses, last = [0.1, 0.2, 0.3], tmp_path / "last.ckpt"
    fit(callbacks(), Classifier(losses), max_epochs=2).save_checkpoint(last)
    said.clear()
    fit(callbacks(), Classifier(losses), max_epochs=3, ckpt_path=last)
    assert said[1:] == ["best val_loss 0.1 at validation 1 of 3, restored · 0 of 12 steps skipped, 100 % clipped"]
    said.clear()
    fit(callbacks(), Classifier(losses), max_epochs=2, ckpt_path=last)
    assert not said


class Interrupted(Classifier):
    """Press Ctrl-C in the third epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            raise self.exception


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("a fault")], ids=repr)
def test_an_interrupted_fit_says_what_the_module_holds(exception: BaseException, said: list[str]) -> None:
    callback, model = EarlyStopping("val_loss"), Interrupted([0.1, 0.2])
    model.exception = exception
    with pytest.raises((SystemExit, RuntimeError, KeyboardInterrupt)):
        fit([callback, GradientClipping(0.01)], model)
        raise SystemExit  # some versions of Lightning end the fit without an exception
    best = "best val_loss 0.1 at validation 1 of 2, which `restore_best_(model)` writes into it"
    interrupted = f"interrupted: the module holds its raw weights · {best} · 0 of 8 steps skipped, 100 % clipped"
    assert said[1:] == ([interrupted] if isinstance(exception, KeyboardInterrupt) else [])
    callback.restore_best_(model)


class Broken(OptimCallback):
    """Fail to describe itself."""

    def describe_run(self) -> str:
        raise RuntimeError("no words")

    def report(self) -> str:
        raise RuntimeError("no report")


def test_a_callback_that_fails_to_describe_itself_ends_no_fit(said: list[str]) -> None:
    with pytest.warns(UserWarning) as told:
        fit([Broken(), GradientClipping(0.01)])
    assert [str(one.message) for one in told if "Broken" in str(one.message)] == [
        "Broken.describe_run raised RuntimeError: no words",
        "Broken.report raised RuntimeError: no report",
    ]
    assert len(said) == 2


class StopsAtOnce(Callback):
    """Press Ctrl-C before the callbacks that come later have begun."""

    def on_train_start(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_at_the_start_leaves_no_session_open(said: list[str]) -> None:
    callbacks = [OptimCallback(), StopsAtOnce(), GradientClipping(1.0)]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(callbacks)
        raise SystemExit
    assert callbacks[0].fit is None and callbacks[2].fit is None


def two_processes() -> list[str]:
    logger, handler = logging.getLogger(LOGGER), Said()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        callbacks = [GradientClipping(0.01), EarlyStopping("val_loss")]
        fit(callbacks, strategy=DDPStrategy(), plugins=[LivingEnvironment()], devices=2)
    finally:
        logger.removeHandler(handler)
    return handler.messages


def test_of_two_processes_the_first_says_it_once(group: Group) -> None:
    first, second = group.run(two_processes)
    assert len(first) == 2 and first[0].startswith("optimizer 0") and first[1].startswith("best val_loss")
    assert not second


def test_the_average_of_checkpoints_is_reported(said: list[str], tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, filename="{epoch}")
    fit([saver, CheckpointAveraging(top=2)], enable_checkpointing=True)
    start, end = said
    assert start == "average of the best 2 checkpoints at the end, kept if it is better than the best one"
    assert end.split(": ")[0] in ("average of 2 checkpoints restored", "best checkpoint restored")


def test_an_early_stopping_that_never_stops() -> None:
    assert EarlyStopping("val_loss", patience=math.inf).describe_run() == (
        "no stop by patience, best by val_loss kept in memory"
    )
    by = EarlyStopping("val_loss", patience=math.inf, best_by="acc", mode="max", restore_best=False)
    assert by.describe_run().startswith("no stop by patience, best by ")
