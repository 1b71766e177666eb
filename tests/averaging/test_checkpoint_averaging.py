"""CheckpointAveraging: errors of the user and of files, tied weights, and buffers without a mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import spectral_norm as hooked
from torch.nn.utils.parametrizations import spectral_norm

from lightning_optim import CheckpointAveraging
from tests.averaging.models import Model, assert_close, assert_equal, data, fit, snapshot
from tests.lightning import PACKAGE, ModelCheckpoint


class Scripted(Model):
    """A model of one number, which takes the ``values`` in turn and is scored by its distance from ``target``."""

    def __init__(self, values: list[float], target: float, after: Callable[[Scripted], Any] | None = None) -> None:
        super().__init__(nn.Linear(1, 1))
        self.values, self.target, self.after, self.validations = values, target, after, 0

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net.weight.fill_(self.values[self.trainer.current_epoch])
        return 0.0 * self.net.weight.sum()

    def validation_step(self, batch, batch_idx) -> None:
        self.validations += 1
        if self.validations > len(self.values) and self.after is not None:
            self.after(self)
        else:
            self.log("val_loss", (self.net.weight - self.target).abs().sum())

    def on_validation_end(self) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit(folder: Path, model: Model, monitor: str = "val_loss", epochs: int = 3, **arguments: Any) -> tuple[Any, Any]:
    saved = ModelCheckpoint(folder, monitor=monitor, save_top_k=2)
    callback = CheckpointAveraging(top=2, **arguments)
    torch.manual_seed(0)
    fit(model, [saved, callback], enable_checkpointing=True, max_epochs=epochs, train=data(1), limit_val_batches=1)
    return callback, saved


def _raises(error: Exception) -> Callable[[Any], Any]:
    def after(_: Any) -> None:
        raise error

    return after


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(
    "error", [KeyError("entry"), ValueError("a value"), OSError("a file"), IndexError(3)], ids=repr
)
def test_an_error_of_the_users_validation_comes_out(tmp_path: Path, greedy: bool, error: Exception) -> None:
    model = Scripted([1.0, 2.0, 5.0], 0.0, _raises(error))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module=PACKAGE.replace(".", r"\."))
        with pytest.raises(type(error)) as raised:
            _fit(tmp_path, model, greedy=greedy)
    assert raised.value is error
    assert model.net.weight.item() == 5.0  # the raw weights are back


@pytest.mark.parametrize("greedy", [False, True])
def test_an_error_of_the_users_training_step_comes_out_too(tmp_path: Path, greedy: bool) -> None:
    class Fails(Model):
        def training_step(self, batch, batch_idx):
            if not self.training and self.trainer.current_epoch >= 2:
                raise KeyError("entry")
            return super().training_step(batch, batch_idx)

    model = Fails(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    with pytest.raises(KeyError, match="entry"):
        _fit(tmp_path, model, greedy=greedy)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_metric_that_the_validation_does_not_log_is_named(tmp_path: Path, greedy: bool) -> None:
    class LogsInTraining(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_epoch=True, on_step=False)
            return loss

    model = LogsInTraining()
    with pytest.warns(UserWarning, match="the validation of the average does not log 'train_l"):
        callback, saved = _fit(tmp_path, model, monitor="train_loss", greedy=greedy)
    assert (callback.path, callback.score, callback.best_path) == ("", None, saved.best_model_path)
    assert_equal(snapshot(model), torch.load(saved.best_model_path, weights_only=True)["state_dict"])


@pytest.mark.parametrize(
    ("target", "mean_wins"),
    # The best two are 1.0 and 2.0, with the mean 1.5. At 1.25 it scores .25, as the best does.
    [(1.25, False), (1.3125, True), (1.1875, False)],
)
def test_a_mean_that_is_only_as_good_as_the_best_does_not_win(tmp_path: Path, target: float, mean_wins: bool) -> None:
    model = Scripted([9.0, 1.0, 2.0], target)
    callback, saved = _fit(tmp_path, model)
    assert callback.score == abs(1.5 - target)
    assert callback.best_path == (callback.path if mean_wins else saved.best_model_path)
    assert model.net.weight.item() == (1.5 if mean_wins else 1.0)


# ---- buffers that have no mean ----


class Normed(Model):
    """A model of sixteen layers, whose largest singular value is 1 if their vectors are right."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(nn.Sequential(*(norm(nn.Linear(6, 6, bias=False)) for _ in range(16)), nn.Linear(6, 1)), 2.0)

    def largest(self) -> float:
        self.eval()
        self.net(torch.zeros(1, 6))
        return max(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in self.net[:-1])


@pytest.mark.parametrize("norm", [spectral_norm, hooked], ids=["parametrization", "hook"])
def test_vectors_of_spectral_normalization_are_those_of_the_mean(tmp_path: Path, norm: Any) -> None:
    model = Normed(norm)
    callback, _ = _fit(tmp_path, model, epochs=4)
    mean = Normed(norm)
    mean.load_state_dict(torch.load(callback.path, weights_only=True)["state_dict"])
    assert mean.largest() < 1.01


def test_scales_and_zero_points_of_quantization_belong_together(tmp_path: Path) -> None:
    class Quantized(Model):
        def __init__(self) -> None:
            super().__init__(
                nn.Sequential(
                    FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8),
                    nn.Linear(6, 1),
                )
            )

        def training_step(self, batch, batch_idx):
            x = batch[0] * (1.0 + self.trainer.current_epoch) + 9.0 * self.trainer.current_epoch
            return super().training_step((x, batch[1]), batch_idx)

    model = Quantized()
    callback, saved = _fit(tmp_path, model)
    best = torch.load(saved.best_model_path, weights_only=True)["state_dict"]
    mean = torch.load(callback.path, weights_only=True)["state_dict"]
    names = [name for name in best if name.startswith("net.0.")]
    assert {"net.0.scale", "net.0.zero_point"} <= set(names)
    assert_equal({name: mean[name] for name in names}, {name: best[name] for name in names})
    assert not torch.equal(mean["net.1.weight"], best["net.1.weight"])


def test_an_overridden_state_dict_and_an_expanded_buffer(tmp_path: Path) -> None:
    class Partial(Model):
        def __init__(self) -> None:
            super().__init__()
            self.strict_loading = False
            self.base = nn.Linear(6, 6).requires_grad_(False)
            self.register_buffer("ones", torch.ones(1).expand(3))

        def forward(self, x):
            return self.net(self.base(x) * self.ones.mean())

        def state_dict(self):
            return {name: tensor for name, tensor in super().state_dict().items() if not name.startswith("base")}

    model = Partial()
    base = model.base.weight.clone()
    callback, _ = _fit(tmp_path, model)
    mean = torch.load(callback.path, weights_only=True)["state_dict"]
    files = [torch.load(path, weights_only=True)["state_dict"] for path in callback.kept]
    assert_close(mean, {name: (files[0][name] + files[1][name]) / 2.0 for name in mean})
    assert torch.equal(model.base.weight, base) and model.ones.tolist() == [1.0] * 3
