"""Checkpoints of runs with early stopping: also one that is written after the fit, when the module holds the best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import EMA, SWA, EarlyStopping, Plateau, WeightAveraging
from tests.harness.cells import Cell
from tests.integration import entry_fits
from tests.lightning import Callback, LightningModule, ModelCheckpoint, Trainer
from tests.lightning import EarlyStopping as LightningEarlyStopping
from tests.registry import BY_NAME
from tests.stopping.scripted_fits import Scripted, fit, same, weights

EARLIER, LATER = [3.0, 1.0, 2.0, 2.0, 2.0], [3.0, 1.0, 2.0, 2.0, 0.5]
"""The best of five epochs is in the first fit of three, or in what the resumed fit adds."""

AVERAGES: dict[str, Callable[[], list[Callback]]] = {
    "raw": list,
    "evaluated": lambda: [WeightAveraging(EMA(0.9))],
    "late": lambda: [WeightAveraging(SWA(), start=6, buffers="average")],
    "beside": lambda: [WeightAveraging(EMA(0.9), evaluate=False)],
}


def stopping(dirpath: Path | None, **options: Any) -> EarlyStopping:
    return EarlyStopping("val_loss", patience=math.inf, dirpath=dirpath and str(dirpath), **options)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("scores", [EARLIER, LATER], ids=["earlier", "later"])
@pytest.mark.parametrize("in_directory", [False, True])
def test_a_file_written_after_a_fit(average: str, scores: list[float], in_directory: bool, tmp_path: Path) -> None:
    """Write the best weights as `state_dict`; a run that resumes from it equals the run that continued."""
    make = AVERAGES[average]
    dirpath = tmp_path / "best" if in_directory else None
    whole, first, again = Scripted(scores), Scripted(scores), Scripted(scores)
    fit(whole, *make(), stopping(dirpath))
    fit(first, *make(), stopping(dirpath), max_epochs=3).save_checkpoint(tmp_path / "after.ckpt")
    assert same(weights(first), first.seen[1])
    assert same(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], first.seen[1])
    resumed = stopping(dirpath)
    fit(again, *make(), resumed, ckpt_path=tmp_path / "after.ckpt")
    assert same(weights(again), weights(whole))
    assert all(same(one, other) for one, other in zip(again.seen, whole.seen[3:], strict=True))
    assert resumed.best_check == (1 if scores is EARLIER else 4)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("in_directory", [False, True])
def test_a_file_written_after_a_fit_of_which_nothing_is_left(average: str, in_directory: bool, tmp_path: Path) -> None:
    make = AVERAGES[average]
    dirpath = tmp_path / "best" if in_directory else None
    first, again = Scripted(EARLIER), Scripted(EARLIER)
    fit(first, *make(), stopping(dirpath), max_epochs=3).save_checkpoint(tmp_path / "after.ckpt")
    resumed = stopping(dirpath)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not all of the best weights")
        fit(again, *make(), resumed, max_epochs=3, ckpt_path=tmp_path / "after.ckpt")
    assert same(weights(again), weights(first))
    assert resumed.best_check == 1


@pytest.mark.parametrize("in_directory", [False, True])
def test_a_file_written_within_an_average_after_a_fit(in_directory: bool, tmp_path: Path) -> None:
    """Then there are three sets of weights: the average lies over the best, and the raw ones are beside."""
    dirpath = tmp_path / "best" if in_directory else None
    whole, first, again = Scripted(EARLIER), Scripted(EARLIER), Scripted(EARLIER)
    fit(whole, WeightAveraging(EMA(0.9)), stopping(dirpath))
    average = WeightAveraging(EMA(0.9))
    trainer = fit(first, average, stopping(dirpath), max_epochs=3)
    with average.averaged_weights(first):
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        saved = weights(first)
    assert not same(saved, weights(first))
    assert same(torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"], saved)
    fit(again, WeightAveraging(EMA(0.9)), stopping(dirpath), ckpt_path=tmp_path / "after.ckpt")
    assert same(weights(again), weights(whole))
    assert all(same(one, other) for one, other in zip(again.seen, whole.seen[3:], strict=True))


def test_no_more_memory_than_the_best(tmp_path: Path) -> None:
    """Keep the raw weights in the storage of the best ones."""
    callback, first = stopping(None), Scripted(EARLIER)
    trainer = fit(first, callback, max_epochs=2)
    kept = {tensor.data_ptr() for tensor in callback.state_dict()["raw"].values()}
    second = stopping(None)

    class Looking(Scripted):
        def on_train_end(self) -> None:
            self.places = {tensor.data_ptr() for tensor in second.state_dict()["best"].values()}

    looking = Looking(EARLIER)
    fit(looking, second, max_epochs=2)
    assert looking.places == {tensor.data_ptr() for tensor in second.state_dict()["raw"].values()}
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer.save_checkpoint(tmp_path / "two.ckpt")  # saving does not change anything
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("one", "two"))
    assert same(one["state_dict"], two["state_dict"])
    assert kept == {tensor.data_ptr() for tensor in callback.state_dict()["raw"].values()}


def test_a_second_fit_goes_on_from_the_best() -> None:
    """Start with new optimizers, as in Lightning, and without the state of the raw weights."""
    first = Scripted(EARLIER)
    callback = stopping(None)
    trainer = fit(first, callback, max_epochs=3)
    best = weights(first)
    trainer.fit_loop.max_epochs = 5

    begun: list[Any] = []

    class Looking(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            begun.append((weights(pl_module), dict(trainer.optimizers[0].state)))

    trainer.callbacks.append(Looking())
    trainer.fit(first, trainer.train_dataloader, trainer.val_dataloaders)
    ((began_with, state),) = begun
    assert same(began_with, best)
    assert state == {}
    assert len(callback.history) == 2, "a second fit begins anew"
    assert same(weights(first), first.seen[3]), "the first check of the second fit was its best"


@pytest.mark.parametrize("in_directory", [False, True])
def test_the_same_trainer_resumes_its_own_file(in_directory: bool, tmp_path: Path) -> None:
    """Module, callback and Trainer are those of the first fit: what they hold of it is not taken for the file's."""
    whole, module = Scripted(EARLIER), Scripted(EARLIER)
    fit(whole, stopping(None))
    callback = stopping(tmp_path / "best" if in_directory else None)
    trainer = fit(module, callback, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    with torch.no_grad():
        module.net[0].weight.zero_()
    trainer.fit_loop.max_epochs = 5
    loaders = trainer.train_dataloader, trainer.val_dataloaders
    trainer.fit(module, *loaders, ckpt_path=tmp_path / "after.ckpt")
    assert same(module.seen[-1], whole.seen[-1])
    assert same(weights(module), weights(whole))


@pytest.mark.parametrize("trained", [True, False])
def test_a_file_written_after_an_exception_and_the_best(trained: bool, tmp_path: Path) -> None:
    """`restore_best_` keeps the raw weights of the trained module; into another one it copies."""

    class Failing(Scripted):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 2 and not self.trainer.ckpt_path:
                self.raw = weights(self)
                raise ZeroDivisionError

    whole, failing, again = Scripted(EARLIER), Failing(EARLIER), Failing(EARLIER)
    fit(whole, stopping(None))
    callback = stopping(None)
    running: list[Trainer] = []
    with pytest.raises(ZeroDivisionError):
        fit(failing, callback, _Catching(running))
    assert same(weights(failing), failing.raw)
    target = failing if trained else Scripted()
    callback.restore_best_(target)
    assert same(weights(target), failing.seen[1])
    running[0].save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert same(saved, failing.seen[1] if trained else failing.raw)
    fit(again, stopping(None), ckpt_path=tmp_path / "after.ckpt")
    assert same(weights(again), weights(whole))
    assert same(again.seen[-1], whole.seen[-1])


class _Catching(Callback):
    def __init__(self, running: list[Trainer]) -> None:
        self.running = running

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.running.append(trainer)


def test_restore_in_the_middle_of_a_fit_copies() -> None:
    """Keep the best weights when a user's callback restores them and continues to train."""
    callback = stopping(None)

    class GoingBack(Scripted):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 3:
                callback.restore_best_(self)
                self.went_back = same(weights(self), self.seen[1])

    module = GoingBack(EARLIER)
    fit(module, callback)
    assert module.went_back
    assert not same(module.seen[3], module.seen[1])
    assert same(weights(module), module.seen[1])


# ---- arguments that were changed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_the_best_survives_another_dirpath(before: bool, after: bool, tmp_path: Path) -> None:
    dirs = {False: None, True: tmp_path / "one"}
    first, again = Scripted(EARLIER), Scripted(EARLIER)
    fit(first, stopping(dirs[before]), max_epochs=3).save_checkpoint(tmp_path / "after.ckpt")
    callback = stopping(tmp_path / "two" if after else None)
    fit(again, callback, ckpt_path=tmp_path / "after.ckpt")
    assert same(weights(again), first.seen[1])
    assert not (tmp_path / "two").exists(), "no check has improved"


def test_a_new_best_is_kept_where_it_is_wanted_now(tmp_path: Path) -> None:
    first, again = Scripted(LATER), Scripted(LATER)
    fit(first, stopping(tmp_path / "one"), max_epochs=3).save_checkpoint(tmp_path / "after.ckpt")
    callback = stopping(tmp_path / "two")
    fit(again, callback, ckpt_path=tmp_path / "after.ckpt")
    assert callback.best_path == str(tmp_path / "two" / "best.ckpt")
    assert same(torch.load(tmp_path / "one" / "best.ckpt", weights_only=True)["state_dict"], first.seen[1])
    assert same(torch.load(callback.best_path, weights_only=True)["state_dict"], again.seen[-1])


@pytest.mark.parametrize(
    "more", [{"stopping_threshold": -1.0}, {"divergence_threshold": 99.0}, {"check_finite": False}, {"patience": 2}]
)
def test_criteria_that_are_new_on_resume(more: dict[str, Any], tmp_path: Path) -> None:
    """Load the state of the criteria that are in the checkpoint."""
    first = Scripted([1.0, 2.0, 2.0, 2.0, 2.0])
    fit(first, EarlyStopping("val_loss", patience=math.inf), max_epochs=2).save_checkpoint(tmp_path / "after.ckpt")
    callback = EarlyStopping("val_loss", **({"patience": math.inf} | more))
    trainer = fit(Scripted(first.scores), callback, ckpt_path=tmp_path / "after.ckpt")
    assert callback.best_score == 1.0
    assert trainer.current_epoch == (3 if "patience" in more else 5)
    assert callback.wait_count == trainer.current_epoch - 1


def test_a_checkpoint_of_lightnings_class(tmp_path: Path) -> None:
    scores = [2.0, 3.0, 3.0, 3.0, 3.0]
    theirs = LightningEarlyStopping("val_loss", patience=3)
    fit(Scripted(scores), theirs, max_epochs=2).save_checkpoint(tmp_path / "theirs.ckpt")
    ours = EarlyStopping("val_loss", patience=3)
    trainer = fit(Scripted(scores), ours, ckpt_path=tmp_path / "theirs.ckpt")
    assert (trainer.current_epoch, ours.wait_count, float(ours.best_score)) == (4, 3, 2.0)
    assert ours.best_check == -1


@pytest.mark.filterwarnings("ignore:Be aware that when using")
@pytest.mark.parametrize(
    ("first", "then"), [(LightningEarlyStopping, EarlyStopping), (EarlyStopping, LightningEarlyStopping)]
)
def test_early_stopping_and_lightnings_resume_each_other(first: Any, then: Any, tmp_path: Path) -> None:
    """A checkpoint of one class resumes in the other: the wait goes on, and training stops where it would have."""
    stop, cell = BY_NAME["stop"], Cell("automatic", "32-true", "single", "1")
    whole = entry_fits.fit(stop, cell, entry_fits.KeepsHistory, callbacks=[first("val_score", patience=2)])
    saver = ModelCheckpoint(tmp_path, "{step:03d}", save_top_k=-1, save_on_train_epoch_end=False)
    entry_fits.fit(
        stop,
        cell,
        entry_fits.KeepsHistory,
        callbacks=[first("val_score", patience=2)],
        extra=(saver,),
        enable_checkpointing=True,
    )
    path = sorted(tmp_path.glob("*.ckpt"))[3]  # after a validation without improvement; after one more, training stops
    resumed = entry_fits.fit(
        stop, cell, entry_fits.KeepsHistory, callbacks=[then("val_score", patience=2)], ckpt_path=path
    )
    assert whole.module.seen == resumed.module.seen == 10
    (one,), (other,) = whole.callbacks[:1], resumed.callbacks[:1]
    assert float(one.best_score) == float(other.best_score) == 2.0
    assert (one.wait_count, one.stopped_epoch) == (other.wait_count, other.stopped_epoch)


def test_state_of_a_criterion_of_ones_own(tmp_path: Path) -> None:
    make: Callable[[], EarlyStopping] = lambda: EarlyStopping(Plateau("val_loss", patience=2), best_by="val_loss")  # noqa: E731
    scores = [1.0, 2.0, 2.0, 2.0, 2.0]
    fit(Scripted(scores), make(), max_epochs=2).save_checkpoint(tmp_path / "after.ckpt")
    callback = make()
    trainer = fit(Scripted(scores), callback, ckpt_path=tmp_path / "after.ckpt")
    assert (trainer.current_epoch, callback.best_check, len(callback.history)) == (3, 0, 3)


def test_a_best_that_cannot_be_read_does_not_lose_the_run(tmp_path: Path) -> None:
    callback = stopping(tmp_path)

    class Breaking(Scripted):
        def on_train_end(self) -> None:
            self.last = weights(self)
            Path(callback.best_path).write_bytes(b"PK\x03\x04 broken")

    module = Breaking(EARLIER)
    with pytest.warns(UserWarning, match=r"keeps its last weights, because .*best\.ckpt.* cannot be read: ValueError"):
        fit(module, callback)
    assert same(weights(module), module.last)
    with pytest.raises(ValueError, match=r"best\.ckpt"):
        callback.restore_best_(module)
    assert same(weights(module), module.last)


def test_a_stop_of_an_earlier_run_is_no_stop_of_this_one(tmp_path: Path) -> None:
    """Withdraw a stop that was requested before `min_epochs` in a run that is resumed with more patience."""
    scores = {"val_loss": [1.0, 1.0, 1.0, 2.0, 0.5, 0.4, 0.3], "other": [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]}
    first = [EarlyStopping("val_loss", patience=math.inf), EarlyStopping("other", patience=1)]
    running = fit(Scripted(scores), *first, max_epochs=7)
    assert running.current_epoch == 2
    running.save_checkpoint(tmp_path / "after.ckpt")
    patient = [EarlyStopping("val_loss", patience=2), EarlyStopping("other", patience=math.inf)]
    trainer = fit(Scripted(scores), *patient, min_epochs=5, max_epochs=7, ckpt_path=tmp_path / "after.ckpt")
    assert trainer.current_epoch == 7
    assert patient[0].stopping_reason_message is None


def test_state_that_is_restored_in_the_middle_of_a_fit(tmp_path: Path) -> None:
    """Load state during a fit, as a learning-rate finder does after its trials."""

    class Restoring(Scripted):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                torch.save(callback.state_dict(), tmp_path / "state.pt")
                callback.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    for dirpath in (None, tmp_path / "best"):
        whole, module, callback = Scripted(EARLIER), Restoring(EARLIER), stopping(dirpath)
        fit(whole, stopping(None))
        trainer = fit(module, callback)
        assert same(weights(module), weights(whole))
        assert len(callback.history) == 5
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        assert "raw" in callback.state_dict()
