"""Averages of all parts of a model: tied, frozen, complex and compiled ones, buffers of every kind, shards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import EMA, LAWA, SWA, EMAWeightAveraging, WeightAveraging, refresh_batchnorm_
from tests.averaging.models import (
    Model,
    assert_close,
    assert_equal,
    data,
    differ,
    ema,
    fit,
    mean,
    norm_net,
    plain_net,
    snapshot,
    trainer,
    two_processes,
)
from tests.harness.cells import Cell
from tests.harness.models import build, full_weights
from tests.harness.operators import Operators
from tests.harness.process_group import Group
from tests.lightning import BackboneFinetuning, ModelCheckpoint

DECAY = 0.8


def averaging(**arguments: Any) -> WeightAveraging:
    return WeightAveraging(arguments.pop("average", EMA(DECAY, warmup=None)), **arguments)


def _file(tmp_path, model: Model, callback, **changes) -> dict[str, Any]:
    files = ModelCheckpoint(tmp_path, filename="one", save_top_k=1)
    fit(model, [callback, files], enable_checkpointing=True, **changes)
    return torch.load(tmp_path / "one.ckpt", weights_only=True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()))


def test_tied_weights_are_averaged_once_and_saved_under_both_names(tmp_path) -> None:
    model = Model(make=Tied)
    callback = averaging()
    saved = _file(tmp_path, model, callback)
    assert model.net.first.weight is model.net.second.weight
    assert len(callback._averaged.sources[0]) == 5
    wanted = ema(model.trajectory, DECAY)
    assert_close(saved["state_dict"], wanted)
    assert_close(snapshot(Model.load_from_checkpoint(tmp_path / "one.ckpt", net=Tied())), wanted)
    assert_equal(saved["current_model_state"], model.trajectory[-1])
    resumed = Model(make=Tied)
    fit(resumed, [averaging()], ckpt=tmp_path / "one.ckpt", max_epochs=3)
    assert_close(snapshot(resumed), ema([*model.trajectory, *resumed.trajectory], DECAY))


class Buffers(nn.Module):
    """A model with buffers of every kind, which each training step moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)
        self.register_buffer("f32", torch.zeros(2))
        self.register_buffer("f16", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("f64", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("c64", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("f8", torch.zeros(2).to(torch.float8_e4m3fn))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.zeros((), dtype=torch.bool))
        self.register_buffer("bound_anew", torch.zeros(2))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.alias = nn.Module()
        self.alias.register_buffer("f32", self.f32)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.count += 1
                self.flag.logical_not_()
                step = float(self.count)
                for buffer in (self.f32, self.f16, self.f64, self.unsaved):
                    buffer.fill_(step)
                self.c64.fill_(complex(step, -step))
                self.f8.copy_(torch.full((2,), step))
                self.bound_anew = torch.full((2,), step)
        return self.layer(x)


@pytest.mark.parametrize("average", [EMA(DECAY, warmup=None), SWA()], ids=repr)
def test_buffers_of_every_kind(tmp_path, average) -> None:
    model = Model(make=Buffers)
    saved = _file(tmp_path, model, averaging(average=average))["state_dict"]
    steps = [{"v": torch.tensor(float(step))} for step in range(1, 17)]
    averaged = float((ema(steps, DECAY) if isinstance(average, EMA) else mean(steps))["v"])
    for state in (saved, snapshot(model), model.validated[-1]):
        for name in ("f32", "f64", "bound_anew", "alias.f32"):
            assert state[f"net.{name}"].tolist() == pytest.approx([averaged] * 2, rel=1e-6)
        assert state["net.f16"].tolist() == pytest.approx([averaged] * 2, rel=1e-2)
        assert state["net.c64"].tolist() == pytest.approx([complex(averaged, -averaged)] * 2, rel=1e-6)
        assert state["net.f8"].float().tolist() == [16.0] * 2
        assert (state["net.count"].item(), state["net.flag"].item()) == (16, False)
    assert model.net.unsaved.tolist() == [16.0] * 2
    assert averaged < 15.0
    resumed = Model(make=Buffers)
    fit(resumed, [averaging(average=type(average)(DECAY, warmup=None) if isinstance(average, EMA) else SWA())],
        ckpt=tmp_path / "one.ckpt", max_epochs=3)  # fmt: skip
    assert resumed.trajectory[0]["net.f32"].tolist() == [17.0] * 2


def test_an_expanded_buffer_which_torch_cannot_write_is_left_alone() -> None:
    model = Model()
    model.register_buffer("expanded", torch.ones(1).expand(3))
    fit(model, [callback := averaging()])
    assert "expanded" not in callback.averaged_state()
    assert model.expanded.tolist() == [1.0] * 3


@pytest.mark.parametrize("average", [EMA(DECAY, warmup=None), SWA(), LAWA(2)], ids=repr)
def test_a_buffer_with_infinities_such_as_a_mask_is_left_alone(average) -> None:
    model = Model()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    mask = model.mask.clone()
    fit(model, [averaging(average=average)])
    assert torch.equal(model.mask, mask)


class Two(Model):
    """A model with two optimizers, the second of the parameters that ``chosen`` returns."""

    def __init__(self, chosen: Callable[[Model], list[nn.Parameter]]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.chosen = chosen

    def training_step(self, batch, batch_idx) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            if any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.05), torch.optim.SGD(self.chosen(self), lr=0.01)]


@pytest.mark.parametrize("average", [SWA(), LAWA(2)], ids=repr)
@pytest.mark.parametrize("shared", [True, False])
def test_parameters_of_two_optimizers_and_optimizers_of_none(average, shared: bool) -> None:
    def chosen(model: Model) -> list[nn.Parameter]:
        return list(model.net[0].parameters() if shared else nn.Linear(1, 1).requires_grad_(False).parameters())

    model, alone = Two(chosen), Two(chosen)
    fit(alone, max_epochs=4)
    fit(model, [averaging(average=average, every="epoch")], max_epochs=4)
    assert_equal(model.trajectory[-1], alone.trajectory[-1])
    ends = model.trajectory[7::8]
    assert_close(snapshot(model), mean(ends if isinstance(average, SWA) else ends[-2:]))


def test_buffers_can_be_the_latest() -> None:
    model = Model(make=Buffers)
    fit(model, [averaging(buffers="copy")])
    assert model.net.f32.tolist() == model.net.bound_anew.tolist() == [16.0] * 2
    assert differ({"w": model.net.layer.weight}, {"w": model.trajectory[-1]["net.layer.weight"]})


def test_averaged_statistics_are_neither_live_nor_initial() -> None:
    model = Model(make=norm_net)
    fit(model, [averaging()])
    wanted = ema(model.trajectory, DECAY)
    assert_close(snapshot(model), wanted, ["net.1.running_mean", "net.1.running_var"])
    assert snapshot(model)["net.1.num_batches_tracked"] == 16


def test_frozen_parameters_are_not_copied() -> None:
    model, callback = Model(), averaging()
    model.net[0].requires_grad_(False)
    fit(model, [callback])
    assert [source.name for source in callback._averaged.sources[0]] == ["net.2.weight", "net.2.bias"]
    assert_close(snapshot(model), ema(model.trajectory, DECAY))


class Tuned(Model):
    """A model that trains its head first, and the backbone from the second epoch on."""

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.05)


@pytest.mark.parametrize("average", [EMA(DECAY, warmup=None), SWA(), LAWA(12)], ids=repr)
def test_what_is_unfrozen_later_is_averaged_as_if_it_had_been_there(average) -> None:
    model = Tuned()
    tuning = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_ratio_lr=1.0, train_bn=True)
    fit(model, [averaging(average=average), tuning], max_epochs=3)
    assert differ({"w": model.trajectory[7]["net.0.weight"]}, {"w": model.trajectory[-1]["net.0.weight"]})
    assert_close(model.trajectory[0], model.trajectory[7], ["net.0.weight"])
    states = model.trajectory[-12:] if isinstance(average, LAWA) else model.trajectory
    assert_close(snapshot(model), ema(states, DECAY) if isinstance(average, EMA) else mean(states))


class Made(Model):
    def __init__(self, where: str) -> None:
        super().__init__(nn.Identity())
        self.where = where

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.net = plain_net()

    def configure_model(self) -> None:
        if self.where == "configure_model" and isinstance(self.net, nn.Identity):
            self.net = plain_net()


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_parameters_that_are_made_late(where: str) -> None:
    model = Made(where)
    fit(model, [averaging()])
    assert_close(snapshot(model), ema(model.trajectory, DECAY))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


def test_complex_parameters() -> None:
    model = Model(make=Complex)
    fit(model, [averaging()])
    factors = [DECAY**15] + [(1 - DECAY) * DECAY ** (15 - index) for index in range(1, 16)]
    wanted = sum(
        f * state["net.weight"].to(torch.complex128) for f, state in zip(factors, model.trajectory, strict=True)
    )
    torch.testing.assert_close(model.net.weight.data, wanted.to(torch.complex64))


@pytest.mark.parametrize("saved_compiled", [True, False])
def test_compiled_submodules_and_their_files(tmp_path, saved_compiled: bool) -> None:
    def net(compiled: bool) -> nn.Module:
        return torch.compile(plain_net(), backend="eager") if compiled else plain_net()

    model = Model(make=lambda: net(saved_compiled))
    _file(tmp_path, model, averaging())
    assert_close(snapshot(model), ema(model.trajectory, DECAY))
    resumed, again = (Model(make=lambda c=compiled: net(c)) for compiled in (saved_compiled, saved_compiled))
    fit(resumed, [averaging()], ckpt=tmp_path / "one.ckpt", max_epochs=3)
    fit(again, [averaging()], max_epochs=3)
    assert_close(snapshot(resumed), snapshot(again))


@pytest.mark.parametrize("compiled", [True, False])
def test_averaged_weights_of_a_compiled_model_go_into_one_that_is_not(compiled: bool) -> None:
    def net(compiled: bool) -> nn.Module:
        return torch.compile(plain_net(), backend="eager") if compiled else plain_net()

    model, callback, other = Model(make=lambda: net(compiled)), averaging(), Model(make=lambda: net(not compiled))
    fit(model, [callback])
    with callback.averaged_weights(other):
        assert_equal({name.replace("_orig_mod.", ""): value for name, value in snapshot(other).items()},
                     {name.replace("_orig_mod.", ""): value for name, value in snapshot(model).items()})  # fmt: skip


# ---- dtype ----


@pytest.mark.parametrize("average", [EMA(0.99, warmup=None), SWA(), LAWA(3)], ids=repr)
def test_an_average_of_half_precision_weights_is_kept_in_32_bits(tmp_path, average) -> None:
    model, callback = Model(), averaging(average=average)
    saved = _file(tmp_path, model, callback, precision="bf16-true")
    exact = {EMA: lambda: ema(model.trajectory, 0.99), SWA: lambda: mean(model.trajectory)}
    wanted = exact.get(type(average), lambda: mean(model.trajectory[-3:]))()
    state = next(value for key, value in saved["callbacks"].items() if key.startswith("WeightAveraging"))
    assert {value.dtype for value in state["averaged"].values()} == {torch.float32}
    assert_close(state["averaged"], wanted)
    assert_equal(saved["state_dict"], {name: value.bfloat16() for name, value in state["averaged"].items()})
    assert_equal(saved["current_model_state"], model.trajectory[-1])
    resumed, whole = Model(), Model()
    fit(resumed, [averaging(average=average)], ckpt=tmp_path / "one.ckpt", max_epochs=3, precision="bf16-true")
    fit(whole, [averaging(average=average)], max_epochs=3, precision="bf16-true")
    assert_equal(snapshot(resumed), snapshot(whole))


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float64", torch.float64), (torch.bfloat16, torch.bfloat16), (None, torch.float32)]
)
def test_the_dtype_can_be_chosen(dtype, kept: torch.dtype) -> None:
    model, callback = Model(), averaging(average=SWA(), dtype=dtype, apply_at_end=False)
    fit(model, [callback])
    assert {tensor.dtype for _, tensor in callback._averaged.pairs()} == {kept}
    with callback.averaged_weights(model):
        tolerance = 0.05 if kept is torch.bfloat16 else 1e-6
        for name, wanted in mean(model.trajectory).items():
            assert (snapshot(model)[name].double() - wanted).abs().max() < tolerance
    assert_equal(snapshot(model), model.trajectory[-1])


def test_double_precision_weights_can_have_a_double_precision_average() -> None:
    for dtype, kept in ((None, torch.float64), (torch.float32, torch.float32)):
        model, callback = Model(), averaging(dtype=dtype, apply_at_end=False)
        fit(model, [callback], precision="64-true")
        assert {tensor.dtype for _, tensor in callback._averaged.pairs()} == {kept}
        assert_equal(snapshot(model), model.trajectory[-1])


def test_a_swap_allocates_a_few_megabytes_and_an_update_nothing() -> None:
    model = Model(make=lambda: nn.Sequential(nn.Linear(6, 3_000_000, bias=False), nn.Linear(1, 1)))
    callback = averaging(apply_at_end=False)
    callback.setup(run := trainer([callback]), model, "fit")
    run.strategy.connect(model)
    run.strategy.optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
    callback.fit.start()
    callback.steps = [0]
    callback.on_train_start(run, model)
    for step in range(1, 3):
        callback.steps = [step]
        with Operators() as made:
            callback.on_after_optimizer_step(run, model, run.optimizers[0])
        assert made.largest_bytes == (72_000_000 if step == 1 else 0)
    with Operators() as made, callback.averaged_weights(model):
        pass
    assert 0 < made.largest_bytes <= 4 << 20
    callback.fit.close()


# ---- shards ----


def _sharded(folder: str, whole_files: bool, average, kind: str) -> list[Any]:
    """Train once in one run, and once in a run that is interrupted after an epoch and resumed."""

    def run(name: str, epochs: int, ckpt: str | None = None):
        module = build(Cell("automatic", "32-true", "fsdp2", "1"))
        module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=0.01)
        saved = ModelCheckpoint(f"{folder}/{name}", filename="{epoch}", save_top_k=-1)
        callback = EMAWeightAveraging(decay=DECAY) if kind == "drop-in" else WeightAveraging(average, every=1)
        changes = {"enable_checkpointing": True, "max_epochs": epochs}
        two_processes([callback, saved], folders=not whole_files, **changes).fit(module, ckpt_path=ckpt)
        return module

    whole, _ = run("whole", 3), run("first", 1)
    second = run("second", 3, f"{folder}/first/epoch=0.ckpt")
    return [full_weights(whole), full_weights(second), whole.raw, second.raw, whole.validations, second.validations]


@pytest.mark.parametrize("whole_files", [True, False], ids=["one file", "a folder"])
@pytest.mark.parametrize("average", [EMA(DECAY), SWA(), LAWA(3), "drop-in"], ids=repr)
def test_shards_are_saved_and_resumed(group: Group, whole_files: bool, average) -> None:
    kind = "drop-in" if isinstance(average, str) else ""
    with tempfile.TemporaryDirectory() as folder:
        for final, resumed, raw, raw_resumed, validations, again in group.run(
            _sharded, folder, whole_files, average, kind
        ):
            assert_equal(resumed, final)
            assert_equal(raw_resumed, raw)
            assert differ(final, raw)
            assert again == validations[1:]


def _sharded_statistics() -> list[Any]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    class Sharded(Model):
        def configure_model(self) -> None:
            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net)

        def train_dataloader(self):
            rank = self.global_rank
            return torch.utils.data.DataLoader([(x[rank::2], y[rank::2]) for x, y in data(size=6)], batch_size=None)

        def on_train_batch_end(self, *args) -> None:
            pass

        def on_validation_end(self) -> None:
            pass

        def val_dataloader(self):
            return data(2, seed=1)

        def validation_step(self, batch, batch_idx) -> None:
            self.log("val_loss", (self(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    model = Sharded(make=norm_net)
    two_processes([averaging(average=SWA())]).fit(model)
    return [full_weights(model), {name: buffer.clone() for name, buffer in model.named_buffers()}]


def test_statistics_of_a_sharded_model_are_pooled(group: Group) -> None:
    results = group.run(_sharded_statistics)
    assert_equal(results[0][1], results[1][1])
    wanted = Model(make=norm_net)
    wanted.load_state_dict({**results[0][0], **results[0][1]})
    refresh_batchnorm_(wanted, [torch.cat([x for x, _ in data(size=6)])])
    assert_close(snapshot(wanted), results[0][1], results[0][1])
