"""BatchNorm statistics are pooled exactly over batches and ranks, and data and random state of the run stay."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_optim import SWA, WeightAveraging, refresh_batchnorm_
from lightning_optim.averaging.batchnorm.refresh_batches import own_copy
from tests.averaging.models import Model, assert_close, assert_equal, data, fit, norm_net, snapshot, two_processes
from tests.harness.process_group import Group


def _rows(count: int, sort: bool = False) -> torch.Tensor:
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1]) + 2.0
    return rows.sort(0).values if sort else rows


@pytest.mark.parametrize("sizes", [[16], [7, 5, 4], [1, 15], [15, 1], [1] * 16, [2, 1, 13]], ids=str)
@pytest.mark.parametrize("sort", [False, True], ids=["shuffled", "sorted"])
def test_statistics_are_those_of_all_rows_together(sizes: list[int], sort: bool) -> None:
    rows, layer = _rows(16, sort), nn.BatchNorm1d(3)
    assert refresh_batchnorm_(layer, rows.split(sizes)) == len(sizes)
    torch.testing.assert_close(layer.running_mean, rows.double().mean(0).float())
    torch.testing.assert_close(layer.running_var, rows.double().var(0).float())


@pytest.mark.parametrize(("layer", "shape"), [(nn.BatchNorm2d(3), (5, 3, 4, 2)), (nn.BatchNorm3d(3), (2, 3, 2, 3, 2))])
def test_images_and_volumes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape)
    refresh_batchnorm_(layer, [values[:2], values[2:]] if len(values) > 2 else [values])
    flat = values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, flat.mean(1))
    torch.testing.assert_close(layer.running_var, flat.var(1))


def test_one_batch_agrees_with_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = norm_net(), norm_net()
    theirs.load_state_dict(ours.state_dict())
    theirs[3].p = ours[3].p = 0.0  # torch leaves dropout on
    batch = [(_rows(8).repeat(1, 2),)]
    refresh_batchnorm_(ours, batch)
    update_bn(batch, theirs)
    torch.testing.assert_close(ours[1].running_mean, theirs[1].running_mean)
    torch.testing.assert_close(ours[1].running_var, theirs[1].running_var)


def test_modes_momentum_and_counts_stay_and_dropout_is_off() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3, momentum=0.3))
    net[1].eval()
    before = torch.get_rng_state()
    refresh_batchnorm_(net, [_rows(8)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(net[1].running_mean, _rows(8).mean(0))
    assert [part.training for part in net.modules()] == [True, True, False]
    assert (net[1].momentum, net[1].num_batches_tracked.item(), net[1].track_running_stats) == (0.3, 0, True)
    assert not net[1]._forward_pre_hooks


def test_an_error_in_the_pass_leaves_everything_as_it_was() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    before = snapshot(net)
    with pytest.raises(RuntimeError):
        refresh_batchnorm_(net, [_rows(1), _rows(4), _rows(4)[:, :2]])
    assert_equal(snapshot(net), before)
    assert net[0].training and net[0].track_running_stats and not net[0]._forward_pre_hooks


def test_what_saw_nothing_keeps_its_statistics() -> None:
    layer = nn.BatchNorm1d(3)
    refresh_batchnorm_(layer, [_rows(1)])
    assert layer.running_var.tolist() == [1.0] * 3
    assert refresh_batchnorm_(nn.BatchNorm1d(3, track_running_stats=False), [_rows(4)]) == 1


def test_half_precision_and_a_shared_layer() -> None:
    layer = nn.BatchNorm1d(3).bfloat16()
    rows = _rows(64).bfloat16()
    refresh_batchnorm_(layer, rows.split(16), lambda batch: (layer(batch), layer(2 * batch)))
    both = torch.cat([rows, 2 * rows]).double()
    torch.testing.assert_close(layer.running_mean.double(), both.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.running_var.double(), both.var(0), rtol=1e-2, atol=1e-2)


def test_a_compiled_part_runs_uncompiled() -> None:
    net = nn.Sequential(torch.compile(nn.BatchNorm1d(3), backend="eager"))
    net(_rows(4))
    refresh_batchnorm_(net, [_rows(8), _rows(9)])
    torch.testing.assert_close(net[0].running_mean, torch.cat([_rows(8), _rows(9)]).mean(0))


# ---- in a fit ----


def _averaged(**arguments) -> WeightAveraging:
    return WeightAveraging(SWA(), **arguments)


def test_the_average_is_validated_with_statistics_of_its_own() -> None:
    model = Model(make=norm_net)
    fit(model, [_averaged()])
    for validated in model.validated:
        wanted = Model(make=norm_net)
        wanted.load_state_dict(validated)
        refresh_batchnorm_(wanted, data())
        assert_close(snapshot(wanted), validated)


def test_refresh_batches_and_refresh_loader() -> None:
    model, loader = Model(make=norm_net), data(5, seed=3)
    fit(model, [_averaged(refresh_batches=3, refresh_loader=loader)])
    wanted = Model(make=norm_net)
    wanted.load_state_dict(model.validated[-1])
    refresh_batchnorm_(wanted, list(loader)[:3])
    assert_close(snapshot(wanted), model.validated[-1])


def test_a_frozen_layer_is_left_alone() -> None:
    class Frozen(Model):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    model = Frozen(make=norm_net)
    fit(model, [_averaged()])
    assert model.validated[-1]["net.1.running_var"].tolist() == [1.0] * 5


@pytest.mark.parametrize("frozen", [False, True])
def test_the_users_own_evaluation_in_eval_mode_has_refreshed_statistics(frozen: bool) -> None:
    class Evaluated(Model):
        seen: torch.Tensor

        def on_train_batch_start(self, batch, batch_idx) -> None:
            self.net[1].train(not frozen)

        def on_train_batch_end(self, *args) -> None:
            self.eval()
            with callback.averaged_weights(self):
                self.seen = self.net[1].running_var.clone()
            self.train()

    callback = _averaged()
    model = Evaluated(make=norm_net)
    fit(model, [callback], max_epochs=1)
    wanted = Model(make=norm_net)
    wanted.load_state_dict(model.validated[-1])
    if not frozen:
        refresh_batchnorm_(wanted, data())
    torch.testing.assert_close(model.seen, wanted.net[1].running_var)
    torch.testing.assert_close(model.validated[-1]["net.1.running_var"], model.seen)


class _Draws(TensorDataset):
    """Data that are augmented with every kind of random generator."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__(*tensors)
        self.own = torch.Generator().manual_seed(1)
        self.numpy, self.python = numpy.random.default_rng(1), random.Random(1)

    def __getitem__(self, index: int):
        x, y = super().__getitem__(index)
        noise = torch.rand(()) + random.random() + numpy.random.rand() + torch.rand((), generator=self.own)
        return x + noise + self.numpy.random() + self.python.random(), y


@pytest.mark.parametrize("shared", [False, True], ids=["global generator", "loader's generator"])
def test_the_runs_data_and_draws_are_untouched(shared: bool) -> None:
    trained = {}
    for refreshes in (False, True):
        model = Model(make=norm_net)
        random.seed(0)
        numpy.random.seed(0)
        generator = torch.Generator().manual_seed(2) if shared else None
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
        loader = DataLoader(_Draws(x, x[:, :1]), batch_size=4, shuffle=True, generator=generator)
        buffers = "refresh" if refreshes else "copy"
        fit(model, [_averaged(buffers=buffers)], train=loader, val_check_interval=4)
        trained[refreshes] = model
    assert trained[True].batches == trained[False].batches
    assert len(set(trained[True].batches)) == 16
    for one, other in zip(trained[True].trajectory, trained[False].trajectory, strict=True):
        assert_equal(one, other)


class _Stateful:
    """A loader that holds its position, as loaders do that resume in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches, self.position, self.seen = list(data()), 0, []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for index in range(self.position % len(self.batches), len(self.batches)):
            self.position = index + 1
            yield self.batches[index]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]


def test_a_loader_that_resumes_keeps_its_position() -> None:
    loader, model = _Stateful(), Model(make=norm_net)
    positions = []
    model.on_validation_end = lambda: positions.append(loader.position)  # type: ignore[method-assign]
    fit(model, [_averaged()], train=loader, val_check_interval=3)
    assert positions == [3, 6, 3, 6]
    assert len(model.batches) == 16
    wanted = Model(make=norm_net)
    wanted.load_state_dict(snapshot(model))
    refresh_batchnorm_(wanted, data())  # the whole of it, although it stood in the middle
    assert_close(snapshot(wanted), snapshot(model))


class _Stream(IterableDataset):
    def __init__(self, length: int = 16) -> None:
        self.left = length

    def __iter__(self):
        while self.left:
            self.left -= 1
            yield torch.full((6,), float(self.left)), torch.ones(1)


def test_a_stream_is_read_by_a_copy_and_what_has_none_is_refused() -> None:
    model = Model(make=norm_net)
    train = DataLoader(_Stream(), batch_size=4)
    fit(model, [_averaged(refresh_batches=2)], train=train, max_epochs=1, val_check_interval=2)
    assert len(model.batches) == 4
    stream = _Stream()
    stream.lines = (line for line in "ab")  # a generator, which nothing copies
    with pytest.raises(ValueError, match="_Stream can be read only once: pass `refresh_loader=`"):
        own_copy(DataLoader(stream))
    with pytest.raises(ValueError, match="list_iterator can be read only once"):
        own_copy(iter([1]))


def test_dictionaries_and_batches_of_another_kind() -> None:
    class Named(Model):
        def forward(self, x, scale=1.0):
            return self.net(x * scale)

        def training_step(self, batch, batch_idx):
            return (self(batch["x"]) - batch["y"]).square().mean()

    class Nested(WeightAveraging):
        def forward_batch(self, pl_module, batch):
            return pl_module.net(batch["x"])

    rows = [{"x": x, "y": y} for x, y in data()]
    final = []
    for callback in (_averaged(), Nested(SWA())):
        model = Named(make=norm_net)
        fit(model, [callback], train=DataLoader(rows, batch_size=None))
        final.append(snapshot(model))
    assert_equal(*final)


# ---- over ranks ----


class Ranked(Model):
    """A model each of whose ranks trains on its part of a batch, of different sizes."""

    def train_dataloader(self):
        part = slice(3) if self.global_rank == 0 else slice(3, None)
        return DataLoader([(x[part], y[part]) for x, y in data(size=5)], batch_size=None)

    def val_dataloader(self):
        return data(2, seed=1)

    def validation_step(self, batch, batch_idx) -> None:
        self.log("val_loss", (self(batch[0]) - batch[1]).square().mean(), sync_dist=True)


def _on_ranks(buffers: str, dtype: torch.dtype = torch.float32):
    model = Ranked(make=norm_net)
    callback = _averaged(buffers=buffers, dtype=dtype)
    two_processes([callback], sharded=False).fit(model)
    return [snapshot(model), model.validated, model.trajectory, callback.averaged_state()]


def test_statistics_are_pooled_over_ranks(group: Group) -> None:
    results = group.run(_on_ranks, "refresh")
    assert_equal(results[0][0], results[1][0])
    wanted = Model(make=norm_net)
    wanted.load_state_dict(results[0][0])
    # The layer's input does not depend on batches, so that pooled statistics are those of all rows.
    refresh_batchnorm_(wanted, [torch.cat([x for x, _ in data(size=5)])])
    assert_close(snapshot(wanted), results[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averaged_buffers_are_the_mean_over_ranks(group: Group, dtype: torch.dtype) -> None:
    results = group.run(_on_ranks, "average", dtype)
    names = ["net.1.running_mean", "net.1.running_var"]
    for final, _, _, averaged in results:
        for name in names:
            means = [sum(state[name].double() for state in rank[2]) / 16 for rank in results]
            assert (means[0] - means[1]).abs().max() > 1e-4
            torch.testing.assert_close(final[name].double(), sum(means) / 2, rtol=1e-5, atol=1e-6)
            if dtype == torch.float64:
                torch.testing.assert_close(averaged[name], sum(means) / 2, rtol=1e-12, atol=0.0)
    assert_equal(results[0][1][0], results[1][1][0])
