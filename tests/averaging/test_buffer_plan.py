"""Modes of buffers: average, copy and refresh, chosen by name and kind, never by value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from lightning_optim import EMA, LAWA, SWA, WeightAveraging
from tests.averaging.models import Model, Moving, assert_close, assert_equal, ema, fit, norm_net, snapshot
from tests.lightning import Callback, MisconfigurationException

DECAY = 0.8


def averaging(**arguments: Any) -> WeightAveraging:
    return WeightAveraging(arguments.pop("average", EMA(DECAY, warmup=None)), **arguments)


class Saves(Callback):
    """A callback that saves after each batch, or at the end of an epoch."""

    def __init__(self, path: Path, epoch: int | None = None) -> None:
        self.path, self.epoch = path, epoch

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.epoch is None:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if self.epoch == trainer.current_epoch:
            trainer.save_checkpoint(self.path)


# ---- spectral normalization ----


FORMS = {"parametrization": spectral_norm, "hook": nn.utils.spectral_norm}


def normed_net(form: str, make: Callable[[], nn.Module] = lambda: nn.Linear(6, 6)) -> nn.Module:
    layers = [FORMS[form](make()) for _ in range(3)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())], nn.Linear(6, 1))


def largest(model: Model) -> float:
    """Return the largest singular value of a normalized layer's weight."""
    values = []
    for layer in model.net:
        if hasattr(layer, "weight_u") or hasattr(layer, "parametrizations"):
            with torch.no_grad():
                layer.eval()(torch.zeros(1, 6))  # the hook makes its weight in forward
                values.append(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)))
    assert len(values) == 3
    return max(values)


def vectors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.endswith(("_u", "_v"))}


class Turning(Model):
    """A model that rotates its singular vectors in training, and records the largest singular value in validations."""

    def __init__(self, form: str, **arguments: Any) -> None:
        super().__init__(make=lambda: normed_net(form), **arguments)
        self.largest: list[float] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.largest.append(largest(self))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("average", [EMA(DECAY), SWA(), LAWA(12)], ids=repr)
def test_vectors_of_spectral_norm_belong_to_the_averaged_weight(tmp_path: Path, form: str, average: Any) -> None:
    model, alone = Turning(form), Turning(form)
    fit(alone, max_epochs=3)
    fit(model, [averaging(average=average), Saves(tmp_path / "one.ckpt")], max_epochs=3)
    assert all(abs(value - 1.0) < 0.02 for value in model.largest)
    assert_equal(model.trajectory[-1], alone.trajectory[-1])  # the raw vectors went on as without an average
    of_file = Model(make=lambda: normed_net(form))
    of_file.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    assert largest(of_file) == pytest.approx(1.0, abs=0.02)
    assert largest(model) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("evaluate", [True, False])
def test_vectors_are_the_same_however_often_they_are_used_and_after_a_resume(
    tmp_path: Path, form: str, evaluate: bool
) -> None:
    def run(*callbacks: Callback, **changes: Any) -> tuple[Turning, WeightAveraging]:
        model, average = Turning(form), averaging(average=SWA(), every=4, evaluate=evaluate)
        fit(model, [average, *callbacks], **changes)
        return model, average

    whole, average = run(max_epochs=3)
    saving, _ = run(Saves(tmp_path / "one.ckpt", 1), max_epochs=3, val_check_interval=2)
    resumed, other = run(ckpt=tmp_path / "one.ckpt", max_epochs=3)
    for model in (saving, resumed):
        assert_equal(snapshot(model), snapshot(whole))
        assert_equal(model.validated[-1], whole.validated[-1])
    assert_equal(other.averaged_state(), average.averaged_state())
    with average.averaged_weights(whole):
        first = snapshot(whole)
    with average.averaged_weights(copy := Turning(form)):
        assert_equal(vectors(snapshot(copy)), vectors(first))
        assert largest(copy) == pytest.approx(1.0, abs=0.02)
    assert len(vectors(first)) == 6


@pytest.mark.parametrize("buffers", ["copy", {"*": "average"}])
def test_vectors_are_known_whatever_the_rest_is(buffers: Any) -> None:
    model = Turning("parametrization")
    fit(model, [averaging(average=SWA(), buffers=buffers)])
    assert largest(model) == pytest.approx(1.0, abs=0.02)


def test_a_pattern_says_that_vectors_are_the_latest() -> None:
    model = Turning("parametrization")
    fit(model, [averaging(average=SWA(), buffers={"net.*": "copy"})])
    assert_equal(vectors(snapshot(model)), vectors(model.trajectory[-1]))


def test_the_norm_may_come_after_another_parametrization_of_a_convolution() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2.0 * weight.square()

    def net() -> nn.Module:
        layer = nn.ConvTranspose1d(1, 3, 3)
        nn.utils.parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
        return nn.Sequential(nn.Unflatten(1, (1, 6)), spectral_norm(layer), nn.Flatten(), nn.Linear(24, 1))

    model = Model(make=net, lr=0.01)
    fit(model, [averaging(average=SWA())])
    weight = model.net[1].weight.detach().transpose(0, 1).flatten(1)
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1.0, abs=1e-3)


def test_vectors_of_a_frozen_weight_are_its_own() -> None:
    model = Turning("parametrization")
    model.net[0].requires_grad_(False)
    model.net[0].parametrizations.weight[0]._u.mul_(0.5)  # no power iteration would keep this
    fit(model, [averaging()])
    assert_equal(
        vectors(snapshot(model.net[0])), {n[6:]: v for n, v in vectors(model.trajectory[-1]).items() if "net.0." in n}
    )


# ---- kinds that are no means ----


class Quantized(nn.Module):
    def __init__(self) -> None:
        from torch.ao import quantization

        super().__init__()
        self.fake = quantization.FakeQuantize(quantization.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8)
        self.fused = quantization.FusedMovingAvgObsFakeQuantize()
        self.extremes = quantization.MinMaxObserver()
        self.histogram = quantization.HistogramObserver(bins=8)
        self.layer = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.factor = getattr(self, "factor", 1.0) * 1.2
            self.histogram(self.extremes(x * self.factor))
            self.fused(self.fake(x * self.factor))
        return self.layer(x)


@pytest.mark.parametrize("average", [EMA(DECAY), SWA()], ids=repr)
def test_scales_extremes_and_histograms_are_the_latest(average: Any) -> None:
    model = Model(make=Quantized)
    fit(model, [averaging(average=average)], max_epochs=1)
    raw, names = model.trajectory[-1], [name for name, _ in model.named_buffers()]
    assert_equal({name: snapshot(model)[name] for name in names}, {name: raw[name] for name in names})
    assert not torch.equal(snapshot(model)["net.layer.weight"], raw["net.layer.weight"])
    assert not torch.equal(model.trajectory[0]["net.fake.scale"], raw["net.fake.scale"])


def test_a_pattern_wins_over_the_kind_and_the_first_over_the_next() -> None:
    model = Model(make=Quantized)
    buffers = {"net.fake.scale": "average", "net.fake.*": "copy", "net.*.scale": "average"}
    fit(model, [averaging(buffers=buffers)], max_epochs=1)
    wanted = ema(model.trajectory, DECAY)
    assert_close(snapshot(model), wanted, ["net.fake.scale", "net.fused.scale"])
    name = "net.fake.activation_post_process.max_val"
    assert torch.equal(snapshot(model)[name], model.trajectory[-1][name])


def test_masks_of_pruning_and_bases_are_the_latest() -> None:
    def net() -> nn.Module:
        made = nn.Sequential(orthogonal(nn.Linear(6, 6)), nn.Linear(6, 1))
        prune.l1_unstructured(made[1], "weight", amount=1)
        return made

    class Changing(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net[1].weight_mask = self.net[1].weight_mask.roll(1, 1)
            self.net[0].parametrizations.weight[0].base = torch.eye(6).roll(batch_idx, 0)

    model = Changing(make=net)
    fit(model, [averaging(average=SWA())])
    for name in ("net.1.weight_mask", "net.0.parametrizations.weight.0.base"):
        assert torch.equal(snapshot(model)[name], model.trajectory[-1][name])


# ---- a dictionary of patterns ----


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6)])
        self.one, self.other = Moving(lambda step: torch.full((2,), float(step))), Moving(lambda step: torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x) + 0.1 * x
        return self.one(x) + self.other(x)


def test_each_buffer_has_the_mode_of_the_first_pattern() -> None:
    buffers = {"net.norms.1.*": "average", "net.one.*": "copy", "*.norms.*": "refresh"}
    model, refreshed = Model(make=Mixed), Model(make=Mixed)
    fit(model, [averaging(buffers=buffers)])
    fit(refreshed, [averaging(buffers="refresh")])
    wanted = ema(model.trajectory, DECAY)
    assert_close(snapshot(model), wanted, ["net.norms.1.running_mean", "net.norms.1.running_var", "net.other.moving"])
    assert model.net.one.moving.tolist() == [16.0] * 2
    assert_close(snapshot(model), snapshot(refreshed), ["net.norms.0.running_mean", "net.norms.0.running_var"])
    name = "net.norms.0.running_mean"
    assert not torch.allclose(snapshot(model)[name].double(), wanted[name], atol=1e-3)


@pytest.mark.parametrize("average", [EMA(DECAY, warmup=None), SWA()], ids=repr)
def test_a_pattern_for_the_rest_is_as_without_a_dictionary(average: Any) -> None:
    ends = []
    for buffers in ("copy", {"*": "copy"}, None, {"net.one.*": "copy"}):
        model = Model(make=Mixed)
        fit(model, [averaging(average=average, buffers=buffers)])
        ends.append(snapshot(model))
    assert_equal(ends[0], ends[1])
    assert_equal({**ends[2], "net.one.moving": ends[3]["net.one.moving"]}, ends[3])


@pytest.mark.parametrize("buffers", [{"a": "mean"}, {"a": None}, {1: "copy"}, {"a": ["copy"]}, ["copy"], "never"])
def test_another_mode_of_buffers_is_refused(buffers: Any) -> None:
    with pytest.raises(ValueError, match=r'`buffers` must be "average", "refresh", "copy" or None, got '):
        averaging(buffers=buffers)


@pytest.mark.parametrize(
    ("buffers", "sentence"),
    [
        (
            {"net.norm.*": "average"},
            r"'net.norm.\*' matches no saved floating-point .*; did you mean 'net.norms.\*'\? Its",
        ),
        ({"*.count": "average"}, r"'\*.count' matches no saved floating-point buffer"),
        ({"net.one.*": "refresh"}, r"'net.one.moving' is neither: choose \"average\" or \"copy\" for it"),
        ({"*.0.running_mean": "refresh", "*.0.running_var": "copy"}, 'estimated together.* pass "refresh" for both'),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_at_the_start(buffers: Any, sentence: str) -> None:
    model = Model(make=Mixed)
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(model, [averaging(buffers=buffers)])
    assert not model.batches


# ---- a checkpoint or a validation changes nothing ----


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
@pytest.mark.parametrize("average", [EMA(DECAY), SWA()], ids=repr)
def test_a_run_that_saves_and_validates_ends_as_one_that_does_not(
    tmp_path: Path, average: Any, precision: Any, dtype: str
) -> None:
    class Drifting(Model):
        def __init__(self) -> None:
            super().__init__(make=lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
            self.register_buffer("drift", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            self.drift = self.drift * 0.9 + x.mean() * 0.1  # in validation too
            return super().forward(x.to(self.net[0].weight.dtype))

    def run(*callbacks: Callback, **changes: Any) -> dict[str, Tensor]:
        model = Drifting()
        torch.manual_seed(1)
        fit(
            model,
            [averaging(average=average, dtype=dtype, buffers="refresh"), *callbacks],
            precision=precision,
            **changes,
        )
        return snapshot(model)

    assert_equal(run(Saves(tmp_path / "one.ckpt"), val_check_interval=2), run(limit_val_batches=0))


@pytest.mark.parametrize("average", [SWA(), EMA(DECAY)], ids=repr)
def test_statistics_that_were_estimated_are_not_averaged_on_when_the_layer_is_frozen(
    tmp_path: Path, average: Any
) -> None:
    class Freezing(Model):
        def __init__(self) -> None:
            super().__init__(make=lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step >= 12:
                self.net[1].eval()

    def run(*callbacks: Callback, **changes: Any) -> dict[str, Tensor]:
        model, ours = Freezing(), averaging(average=average, buffers="refresh")
        fit(model, [ours, *callbacks], max_epochs=2, **changes)
        return ours.averaged_state() | {"raw": model.trajectory[-1]["net.1.running_mean"]}

    quiet = run(limit_val_batches=0)
    assert_equal(run(Saves(tmp_path / "one.ckpt", 0), val_check_interval=2), quiet)
    assert_equal(run(ckpt=tmp_path / "one.ckpt"), quiet)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "float32"), ("32-true", "bfloat16")])
def test_estimated_statistics_have_the_wider_precision(precision: Any, dtype: str) -> None:
    class Plain(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.net[0].weight.dtype))

    model, average = Plain(make=norm_net), averaging(average=SWA(), dtype=dtype)
    seen: list[Tensor] = []
    model.net[1].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach().double()))
    fit(model, [average], precision=precision, limit_val_batches=0)
    wanted = torch.cat(seen[-8:]).mean(0)
    found = average.averaged_state()["net.1.running_mean"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.net[1].running_mean, found.to(model.net[1].running_mean.dtype))
