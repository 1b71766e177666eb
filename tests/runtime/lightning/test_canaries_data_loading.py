"""The private names of loaders and fetchers mean what `runtime/lightning/data_loading.py` takes them for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_optim.runtime.lightning import data_loading
from tests.lightning import CombinedLoader, Trainer
from tests.runtime.lightning.canaries import At, Model, Written, canary, fit, numbers


class Positioned:
    """A loader that saves its position, and counts what it is asked for."""

    def __init__(self) -> None:
        self.position, self.loads, self.iterators = 0, 0, 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        self.iterators += 1
        while self.position < 4:
            self.position += 1
            yield torch.full((1, 1), float(self.position))
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.loads = state["position"], self.loads + 1


class TwoLoaders(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[0], batch_idx)


@canary("_combined_loader")
def test_loaders() -> None:
    training, validation = [numbers(), numbers()], numbers(2)
    found = At(
        "on_train_end",
        lambda trainer: (
            data_loading.training_loaders(trainer),
            data_loading.loaders_of(trainer.fit_loop.epoch_loop.val_loop),
            data_loading.combined_loader(trainer.fit_loop),
        ),
    )
    before = At("on_fit_start", data_loading.training_loaders)
    fit(TwoLoaders(), found, before, training=training, validation=validation)
    (ours, theirs, combined), *_ = found.seen
    assert ours[0] is training[0] and ours[1] is training[1] and len(ours) == 2
    assert theirs[0] is validation and isinstance(combined, CombinedLoader)
    assert before.seen == [[]]


@canary("_combined_loader_states_to_load")
def test_saved_positions_are_taken() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/first.ckpt"
        save = At("on_train_batch_start", lambda trainer: trainer.global_step == 1 and trainer.save_checkpoint(path))
        fit(Model(), save, training=Positioned())
        loader, taken = Positioned(), []

        def take_then_run(trainer: Trainer) -> None:  # when all is restored, and no loader is set up
            run = trainer.fit_loop.run
            trainer.fit_loop.run = lambda: (taken.append(data_loading.take_saved_positions(trainer)), run())  # type: ignore

        fit(Model(), At("setup", take_then_run), training=loader, resume=path)
        assert taken == [[{"position": 2}]] and loader.loads == 0
        fit(Model(), training=loader, resume=path)
        assert loader.loads == 1


def test_positions_are_loaded() -> None:
    loader, plain = Positioned(), numbers()

    def load(trainer: Trainer) -> list[Any]:
        with pytest.raises(RuntimeError, match="positions of 2 training loaders, and 1 of the present"):
            data_loading.load_positions_(trainer, [{"position": 0}] * 2)
        data_loading.load_positions_(trainer, [{"position": 2}])
        return data_loading.positions(trainer)

    seen = At("on_train_start", load)
    values = At("on_train_batch_end", lambda trainer: float(trainer.callback_metrics["value"]))
    fit(TwoLoaders(), seen, values, training=CombinedLoader([loader, plain], "min_size"))
    assert seen.seen == [[{"position": 2}]] and loader.loads == 1
    assert data_loading.saves_position(loader) and not data_loading.saves_position(plain)


@canary("_data_fetcher")
def test_iterators_start_anew() -> None:
    loader = Positioned()
    counts = At("on_train_start", lambda trainer: (loader.iterators, iter(data_loading.data_fetcher(trainer))))
    fit(Model(), counts, training=loader, limit_train_batches=1)
    before, fetcher = counts.seen[0]
    assert loader.iterators == before + 1 and fetcher is not None


def test_samplers_hear_the_epoch() -> None:
    sampler = DistributedSampler(range(4), num_replicas=1, rank=0)  # type: ignore[arg-type]
    for loader in (
        DataLoader(range(4), sampler=sampler),  # type: ignore[arg-type]
        DataLoader(range(4), batch_sampler=torch.utils.data.BatchSampler(sampler, 2, False)),  # type: ignore[arg-type]
    ):
        sampler.set_epoch(0)
        data_loading.set_sampler_epoch(loader, 3)
        assert sampler.epoch == 3
    data_loading.set_sampler_epoch(Positioned(), 3)


class Reloading(Model):
    def __init__(self) -> None:
        super().__init__()
        self.built: list[str] = []

    def train_dataloader(self) -> Any:
        self.built.append("training")
        return numbers(2)

    def val_dataloader(self) -> Any:
        self.built.append("validation")
        return numbers(2)


def _fit_reloading(*callbacks: Any) -> Reloading:
    model = Reloading()
    trainer = Trainer(
        max_epochs=3,
        callbacks=list(callbacks),
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(model)
    return model


@canary("_last_train_dl_reload_epoch", "_last_val_dl_reload_epoch")
def test_reload_epochs() -> None:
    epochs = At("on_train_epoch_end", data_loading.reload_epochs)
    model = _fit_reloading(epochs)
    assert epochs.seen == [[0, 0], [1, 1], [2, 2]]
    assert model.built.count("training") == model.built.count("validation") == 3
    keep = At("on_train_epoch_end", lambda trainer: data_loading.set_reload_epochs(trainer, [9, trainer.current_epoch]))
    model = _fit_reloading(keep)
    assert model.built.count("training") == 1 and model.built.count("validation") == 3
    keep = At("on_train_epoch_end", lambda trainer: data_loading.set_reload_epochs(trainer, [trainer.current_epoch, 9]))
    model = _fit_reloading(keep)
    assert model.built.count("training") == 3 and model.built.count("validation") == 1


@canary("_seen_batches_per_dataloader")
def test_validated_batches() -> None:
    logger, counts = Written(), At("on_validation_end", lambda trainer: dict(data_loading.validated_batches(trainer)))
    later = At("on_train_start", lambda trainer: data_loading.validated_batches(trainer).update({1: 10}))
    fit(Model(), counts, later, validation=[numbers(2), numbers(3)], logger=logger, max_epochs=2)
    assert counts.seen == [{0: 2, 1: 13}, {0: 4, 1: 16}]
    assert logger.steps_of("seen_step/dataloader_idx_1") == [10, 11, 12, 13, 14, 15]


class Transferring(Model):
    seen: Any = None

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + 10.0

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch * 2.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen = batch
        return super().training_step(batch, batch_idx)


@canary("_on_before_batch_transfer")
def test_to_device() -> None:
    model = Transferring()
    moved = At("on_train_end", lambda trainer: data_loading.to_device(trainer, model, torch.full((1, 1), 3.0)))
    fit(model, moved)
    assert torch.equal(moved.seen[0], model.seen) and model.seen.item() == 26.0


class WithoutIndex(Model):
    def training_step(self, batch: Tensor) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


def test_arguments_of_a_step() -> None:
    for model, expected in ((Model(), ["batch", 3]), (WithoutIndex(), ["batch"])):
        fit(model)  # Lightning calls it so
        assert data_loading.training_step_arguments(model, "batch", 3) == expected


@canary("_iterator")
def test_copies_iterate_apart() -> None:
    combined = CombinedLoader(numbers(), "max_size_cycle")
    iter(combined)
    next(combined)
    copied = data_loading.copy_without_iterator(combined)
    with pytest.raises(AssertionError):
        next(copied)  # has no iterator yet
    assert len(list(copied)) == 4
    assert float(next(combined)[0]) == 1.0
    loader = numbers()
    copied = data_loading.copy_without_iterator(loader, dataset=[7])
    assert list(copied.dataset) == [7] and len(loader.dataset) == 4  # type: ignore[arg-type]
    assert "_iterator" in DataLoader.__annotations__
