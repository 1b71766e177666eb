"""A refresh that cannot work is refused before the first step, and its trial leaves no trace."""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim import (
    LAWA,
    SWA,
    CheckpointAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
    refresh_batchnorm_,
)
from tests.averaging.models import Model, assert_close, assert_equal, data, fit, norm_net, snapshot
from tests.lightning import Callback, MisconfigurationException, ModelCheckpoint


class Steps(Callback):
    """A callback that counts optimizer steps."""

    taken = 0

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.taken += 1


class OnlyInTraining(Model):
    """A model whose step works only in training mode."""

    def training_step(self, batch, batch_idx):
        assert self.training, "losses come in training mode only"
        return super().training_step(batch, batch_idx)


class Manual(Model):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class OwnIterator(Model):
    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Once(IterableDataset):
    """A stream that cannot be copied."""

    def __init__(self) -> None:
        self.rows = iter([(torch.randn(6), torch.randn(1)) for _ in range(32)])
        self.lock = threading.Lock()

    def __iter__(self):
        return self.rows


AVERAGES = [
    WeightAveraging(SWA(), start=1000),
    WeightAveraging(LAWA(3), evaluate=False),
    StochasticWeightAveraging(swa_epoch_start=2, device=None),
]
WAYS_OUT = (
    r"Override `\w+\.forward_batch\(pl_module, batch\)` with a forward pass, pass `refresh_loader=` .*\"average\"`"
)


def _refusal(model: Model, average: Callback, *others: Callback, **arguments: Any) -> str:
    steps = Steps()
    with pytest.raises(MisconfigurationException, match=WAYS_OUT) as refused:
        fit(model, [steps, average, *others], **arguments)
    assert steps.taken == 0
    return str(refused.value)


@pytest.mark.filterwarnings("ignore:.* has no effect")
@pytest.mark.parametrize("average", AVERAGES, ids=lambda average: type(average).__name__)
def test_a_step_that_fails_in_eval_mode_is_refused(average: Callback) -> None:
    said = _refusal(OnlyInTraining(make=norm_net), average)
    assert "calls of `OnlyInTraining.training_step` in eval mode" in said
    assert "a trial on one batch ended with: AssertionError: losses come in training mode only" in said


def test_checkpoint_averaging_is_refused_too(tmp_path) -> None:
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    said = _refusal(OnlyInTraining(make=norm_net), CheckpointAveraging(top=2), saved, enable_checkpointing=True)
    assert said.startswith("CheckpointAveraging estimates the BatchNorm statistics")


def test_manual_optimization_is_refused() -> None:
    said = _refusal(Manual(make=norm_net), WeightAveraging(SWA()))
    assert "under manual optimization that would take optimizer steps" in said


def test_a_step_that_takes_the_loaders_iterator_is_refused_by_name() -> None:
    assert "`dataloader_iter`" in _refusal(OwnIterator(make=norm_net), WeightAveraging(SWA()))


def test_data_that_can_be_read_once_only_are_refused() -> None:
    said = _refusal(Model(make=norm_net), WeightAveraging(SWA()), train=DataLoader(Once(), batch_size=4))
    assert "Once can be read only once" in said


def test_a_refresh_loader_of_other_batches_is_refused() -> None:
    average = WeightAveraging(SWA(), refresh_loader=DataLoader(torch.randn(8, 3), batch_size=4))
    assert "RuntimeError: mat1 and mat2" in _refusal(Model(make=norm_net), average)


@pytest.mark.parametrize("model", [Model, Manual, OwnIterator, OnlyInTraining])
def test_an_overridden_forward_batch(model: type[Model]) -> None:
    class Forward(WeightAveraging):
        def forward_batch(self, pl_module, batch):
            pl_module.batches.append(1.0)
            return pl_module(batch[0])

    fitted = model(make=norm_net)
    fit(fitted, [Forward(SWA())])
    assert len(fitted.batches) == 16
    _assert_own_statistics(fitted)


def _assert_own_statistics(model: Model) -> None:
    wanted = Model(make=norm_net)
    wanted.load_state_dict(snapshot(model))
    refresh_batchnorm_(wanted, data())
    assert_close(snapshot(wanted), snapshot(model))


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_without_an_estimate_nothing_is_tried(buffers: Any) -> None:
    model = OnlyInTraining(make=norm_net)
    fit(model, [WeightAveraging(SWA(), buffers=buffers)])
    assert len(model.trajectory) == 16


def test_frozen_layers_are_not_tried_until_they_are_trained() -> None:
    class Frozen(OnlyInTraining):
        until = 9

        def on_train_batch_start(self, batch, batch_idx) -> None:
            self.net[1].train(self.current_epoch >= self.until)

    model = Frozen(make=norm_net)
    fit(model, [WeightAveraging(SWA())])
    assert len(model.trajectory) == 16
    model = Frozen(make=norm_net)
    model.until = 1
    with pytest.raises(MisconfigurationException, match=WAYS_OUT):
        fit(model, [WeightAveraging(SWA())])
    assert len(model.trajectory) == 8


def test_what_a_hook_prepares_is_there() -> None:
    class Prepared(Model):
        def on_train_batch_start(self, batch, batch_idx) -> None:
            self.scale = 2.0

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

    model = Prepared(make=norm_net)
    fit(model, [WeightAveraging(SWA())])
    _assert_own_statistics(model)


def test_what_a_step_logs_goes_nowhere() -> None:
    heard = []

    class Heard(Model):
        def log(self, name, *args, **kwargs):
            heard.append(name)
            super().log(name, *args, **kwargs)

        def training_step(self, batch, batch_idx):
            self.log("one", 1.0)
            self.log_dict({"two": 2.0})
            return super().training_step(batch, batch_idx)

    fit(Heard(make=norm_net), [WeightAveraging(SWA())], max_epochs=1)
    assert [name for name in heard if name != "val_loss"] == ["one", "two"] * 8


def test_a_resumed_run_is_tried_too(tmp_path) -> None:
    path = str(tmp_path / "first.ckpt")
    fit(Model(make=norm_net), [WeightAveraging(SWA())], max_epochs=1).save_checkpoint(path)
    with pytest.raises(MisconfigurationException, match=WAYS_OUT):
        fit(OnlyInTraining(make=norm_net), [WeightAveraging(SWA())], ckpt=path)


class _Position(Callback):
    """Record weights, buffers and random state after each batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        drawn = torch.tensor([random.random(), numpy.random.rand(), float(torch.rand(()))])
        self.seen.append({**snapshot(pl_module), "drawn": drawn})


class Stateful:
    """A loader that saves its position."""

    def __init__(self) -> None:
        self.batches, self.position = list(data()), 0

    def __iter__(self):
        for index in range(self.position, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


class Streamed(IterableDataset):
    def __init__(self) -> None:
        self.left = 32

    def __iter__(self):
        while self.left:
            self.left -= 1
            yield torch.full((6,), float(self.left)).sin() + torch.rand(6), torch.ones(1)


def _shuffled(**arguments: Any) -> DataLoader:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(torch.utils.data.TensorDataset(x, x[:, :1]), batch_size=4, shuffle=True, **arguments)


LOADERS = {
    "global generator": _shuffled,
    "own generator": lambda: _shuffled(generator=torch.Generator().manual_seed(4)),
    "position": Stateful,
    "stream": lambda: DataLoader(Streamed(), batch_size=4),
}


@pytest.mark.filterwarnings("ignore:.* has no effect")
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_trial_leaves_no_trace(loader: Any) -> None:
    seen = []
    for buffers in ("refresh", "copy"):
        random.seed(0)
        numpy.random.seed(0)
        torch.manual_seed(0)
        model, position = Model(make=norm_net), _Position()
        average = WeightAveraging(SWA(), start=1000, buffers=buffers)
        fit(model, [position, average], train=loader(), max_epochs=1)
        seen.append([*position.seen, snapshot(model)])
        assert not average.started
    for one, other in zip(*seen, strict=True):
        assert_equal(one, other)
    assert len(seen[0]) == 9


class _Locked:
    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0


@pytest.mark.parametrize("held", ["an object", "an iterator"])
def test_what_cannot_be_put_back_is_named(held: str) -> None:
    class Holder(Model):
        def training_step(self, batch, batch_idx):
            if held == "an object":
                self.net[0].tool.count += 1
            else:
                self.scale = next(self.more["scales"])
            return super().training_step(batch, batch_idx)

    model = Holder(make=norm_net)
    model.net[0].tool, model.more = _Locked(), {"scales": itertools.count()}
    named = r"self\.net\.0\.tool \(_Locked\)" if held == "an object" else r"self\.more\['scales'\]"
    with pytest.warns(UserWarning, match=rf"changed {named}, which cannot be restored.*Override `forward_batch`"):
        fit(model, [WeightAveraging(SWA())])
    assert isinstance(model.more["scales"], itertools.count)


def test_a_lazy_model_is_tried_once_its_parameters_exist() -> None:
    class Lazy(OnlyInTraining):
        def training_step(self, batch, batch_idx):
            assert self.training or batch_idx != 0 or isinstance(self.net[0], nn.Linear)
            return super().training_step(batch, batch_idx)

    model = Lazy(nn.Sequential(nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)))
    with pytest.raises(MisconfigurationException, match="losses come in training mode only"):
        fit(model, [WeightAveraging(SWA())])
    assert len(model.trajectory) == 1
    assert mse_loss(model.net[1].running_mean, torch.zeros(5)) > 0.0
