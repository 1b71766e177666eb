"""Averages of models and checkpoints, soups, and the callback that averages the best checkpoints."""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_optim import (
    EMA,
    CheckpointAveraging,
    EarlyStopping,
    WeightAveraging,
    average_checkpoints,
    average_weights,
    greedy_soup,
    refresh_batchnorm_,
)
from tests.averaging.models import (
    Model,
    assert_close,
    assert_equal,
    data,
    fit,
    norm_net,
    plain_net,
    snapshot,
    trainer,
    two_processes,
)
from tests.harness.process_group import Group
from tests.lightning import MisconfigurationException, ModelCheckpoint


def _models(count: int, make=plain_net) -> list[nn.Module]:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(make())
    return models


# ---- average_weights ----


@pytest.mark.parametrize("weights", [None, [1, 2, 3], [0, 0, 1], [0.0, 1.0, 0.5], [1e-3, 1e3, 1.0]], ids=str)
def test_the_weighted_mean_in_double_precision(weights) -> None:
    models = _models(3)
    mean = average_weights(models, weights)
    shares = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    for name in mean:
        wanted = sum(share * model.state_dict()[name].double() for share, model in zip(shares, models, strict=True))
        torch.testing.assert_close(mean[name].double(), wanted, rtol=1e-5, atol=1e-6)
        assert mean[name].dtype == torch.float32


def test_agrees_with_torch() -> None:
    models = _models(4)
    theirs = AveragedModel(models[0])
    for model in models:
        theirs.update_parameters(model)
    assert_close(average_weights(models), theirs.module.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_each_dtype_comes_back_and_the_sum_is_wider(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(50, generator=generator, dtype=torch.float64).to(dtype)} for _ in range(20)]
    exact = sum(state["w"].to(torch.complex128 if dtype.is_complex else torch.float64) for state in states) / 20
    mean = average_weights(states)["w"]
    assert mean.dtype == dtype
    wide = exact.to(dtype)  # rounded once
    if dtype in (torch.bfloat16, torch.float16):
        assert (mean == wide).float().mean() > 0.95
    torch.testing.assert_close(mean, wide)


def test_integers_bools_and_other_values_are_the_last() -> None:
    states = [
        {"f": torch.tensor([float(i)]), "i": torch.tensor(i), "b": torch.tensor(i > 0), "extra": {"epoch": i}}
        for i in range(3)
    ]
    mean = average_weights(states)
    assert (mean["f"].item(), mean["i"].item(), mean["b"].item(), mean["extra"]) == (1.0, 2, True, {"epoch": 2})
    states[2]["i"].fill_(7)
    assert mean["i"].item() == 2  # nothing is shared


def test_tied_weights_stay_tied_if_all_are() -> None:
    class Tied(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            if tie:
                self.b.weight = self.a.weight

    one, other, loose = Tied(True), Tied(True), Tied(False)
    mean = average_weights([one, other])
    assert mean["a.weight"].data_ptr() == mean["b.weight"].data_ptr()
    mixed = average_weights([one, loose, other])
    for name in ("a.weight", "b.weight"):
        wanted = sum(m.state_dict()[name] for m in (one, loose, other)) / 3
        torch.testing.assert_close(mixed[name], wanted)


@pytest.mark.parametrize(
    ("states", "weights", "sentence"),
    [
        ([], None, "There is nothing to average"),
        ([{"a": torch.ones(1)}], [1, 2], r"`weights` must be 1 numbers >= 0, not all zero, with a finite sum"),
        ([{"a": torch.ones(1)}], [-1], "`weights` must be 1 numbers >= 0"),
        ([{"a": torch.ones(1)}], [0], "`weights` must be 1 numbers >= 0"),
        ([{"a": torch.ones(1)}], [float("nan")], "`weights` must be 1 numbers >= 0"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], None, r"model 1 and model 0 have different names: \['a', 'b'\]"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], None, "model 1 and model 0 have different shapes of a"),
    ],
)
def test_refused(states, weights, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        average_weights(states, weights)


# ---- average_checkpoints ----


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Return the checkpoints of a run, one for each epoch."""
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    fit(Model(make=norm_net), [saved], enable_checkpointing=True, max_epochs=4)
    return [str(tmp_path / f"epoch={epoch}.ckpt") for epoch in range(4)]


def _state(path: str) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("weights", [None, [4, 3, 2, 1]])
def test_files_are_averaged_as_what_they_hold(files: list[str], weights, tmp_path: Path) -> None:
    states = [_state(path) for path in files]
    wanted = average_weights(states, weights)
    plain, safe = [], []
    for index, state in enumerate(states):
        plain.append(tmp_path / f"{index}.pt")
        safe.append(tmp_path / f"{index}.safetensors")
        torch.save(state, plain[-1], _use_new_zipfile_serialization=index % 2 == 0)
        save_file(state, safe[-1])
    for kind in (files, plain, safe, [files[0], plain[1], safe[2], files[3]]):
        found = average_checkpoints(kind, weights)
        assert_equal(found, wanted)
    assert found["net.1.num_batches_tracked"].item() == 32


def test_the_mean_outlives_its_files(files: list[str]) -> None:
    mean = average_checkpoints(files)
    wanted = {name: value.clone() for name, value in mean.items()}
    for path in files:
        with open(path, "r+b") as file:
            file.truncate(0)
    assert_equal(mean, wanted)


def test_pickles_of_unknown_origin_are_refused(tmp_path: Path, files: list[str]) -> None:
    path = tmp_path / "strange.ckpt"
    torch.save({"state_dict": _state(files[0]), "hyper_parameters": {"path": Path("x")}}, path)
    with pytest.raises(ValueError, match=r"strange\.ckpt holds more than tensors and plain values"):
        average_checkpoints([path, files[0]])
    assert average_checkpoints([path, files[0]], weights_only=False).keys() == _state(files[0]).keys()
    with pytest.raises(FileNotFoundError):
        average_checkpoints([tmp_path / "none.ckpt"])
    short = tmp_path / "short.safetensors"
    save_file({"net.0.bias": torch.ones(5)}, short)
    save_file({"net.0.bias": torch.ones(4)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"short\.safetensors and .* have different names"):
        average_checkpoints([files[0], short])
    with pytest.raises(ValueError, match=r"have different shapes of net\.0\.bias"):
        average_checkpoints([short, tmp_path / "other.safetensors"])


# ---- soups ----


def _numbers(tmp_path: Path, values: list[float]) -> list[Path]:
    paths = [tmp_path / f"{value}.pt" for value in values]
    for path, value in zip(paths, values, strict=True):
        torch.save({"w": torch.tensor([value])}, path)
    return paths


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_soup_of_a_few_numbers(tmp_path: Path, mode: str) -> None:
    paths = _numbers(tmp_path, [4.0, 1.0, 2.0, 2.8])
    sign = 1.0 if mode == "min" else -1.0
    scored = []

    def score(state) -> float:
        scored.append(round(state["w"].item(), 4))
        return sign * abs(state["w"].item() - 2.3)

    soup = greedy_soup(paths, score, mode=mode, barrier=None)
    # Distances .3 (2.0), .5 (2.8), 1.3 (1.0), 1.7 (4.0): 2.4 is kept, 1.9333 and 2.9333 are not.
    assert scored == [4.0, 1.0, 2.0, 2.8, 2.4, 1.9333, 2.9333]
    assert [Path(path).stem for path in soup.kept] == ["2.0", "2.8"]
    torch.testing.assert_close(soup["w"], torch.tensor([2.4]))
    assert soup.score == pytest.approx(sign * 0.1)
    again = greedy_soup(paths, score, mode=mode, barrier=None, scores=[sign * v for v in (1.7, 1.3, 0.3, 0.5)])
    assert again.kept == soup.kept


def test_a_soup_in_half_precision_is_summed_in_32_bits(tmp_path: Path) -> None:
    states = [{"w": torch.full((1,), 1.0 + index / 128, dtype=torch.bfloat16)} for index in range(8)]
    for index, state in enumerate(states):
        torch.save(state, tmp_path / f"{index}.pt")
    soup = greedy_soup([tmp_path / f"{index}.pt" for index in range(8)], lambda state: 1.0)
    assert len(soup.kept) == 8
    assert torch.equal(soup["w"], average_weights(states)["w"])


def test_models_that_are_not_mode_connected_are_refused(tmp_path: Path) -> None:
    """Two nets from different initial weights are refused; two that were fine-tuned from one net are averaged."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16.0, torch.tensor(digits.target)

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def train(model: nn.Module, steps: int, seed: int) -> nn.Module:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randint(1000, (64,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        return model

    probe = net()

    def accuracy(state) -> float:
        probe.load_state_dict(state)
        return float((probe(x[1000:]).argmax(1) == y[1000:]).float().mean())

    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path / f"start{seed}.pt")
        torch.save(train(net(), 200, seed).state_dict(), paths[-1])
    with pytest.raises(ValueError, match="are not linearly mode-connected: their midpoint scores"):
        greedy_soup(paths, accuracy)
    tuned = []
    for seed in (5, 6):
        model = net()
        model.load_state_dict(torch.load(paths[0]))
        tuned.append(tmp_path / f"tuned{seed}.pt")
        torch.save(train(model, 20, seed).state_dict(), tuned[-1])
    soup = greedy_soup(tuned, accuracy)
    assert soup.score >= max(accuracy(torch.load(path)) for path in tuned)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"paths": []}, "`paths` must not be empty"),
        ({"paths": "a.ckpt"}, r"`paths` must be a list of paths, got 'a.ckpt'"),
        ({"mode": "best"}, "`mode` must be one of 'min', 'max', got 'best'"),
        ({"scores": [1.0]}, "`scores` must have one for each"),
        ({"score": lambda state: float("nan")}, "`scores` must be finite"),
    ],
)
def test_soups_refuse(tmp_path: Path, arguments, sentence: str) -> None:
    given = {"paths": _numbers(tmp_path, [1.0, 2.0]), "score": lambda state: 1.0} | arguments
    with pytest.raises(ValueError, match=sentence):
        greedy_soup(given.pop("paths"), given.pop("score"), **given)


# ---- the callback ----


class Scripted(Model):
    """A model of one number, which becomes 4, 1, 2, … and is scored by its distance from ``target``."""

    def __init__(self, values: list[float], target: float, net: nn.Module | None = None) -> None:
        super().__init__(net or nn.Linear(1, 1))
        self.values, self.target = values, target
        self.ended_with: dict[str, Tensor] = {}

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.net.weight.fill_(self.values[self.trainer.current_epoch])
        return 0.0 * self.net.weight.sum()

    def validation_step(self, batch, batch_idx) -> None:
        self.log("val_loss", (self.net.weight - self.target).abs().sum())

    def on_train_end(self) -> None:
        self.ended_with = snapshot(self)

    def train_dataloader(self):
        return data(1)

    def val_dataloader(self):
        return data(1)


VALUES = [9.0, 4.0, 1.0, 2.0, 7.0]


def _fit(tmp_path: Path, callback: CheckpointAveraging, *others, target: float = 2.6, keep: int = 3, **changes):
    model = Scripted(VALUES, target)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=keep, filename="{epoch}")
    fitted = trainer([callback, saved, *others], enable_checkpointing=True, max_epochs=len(VALUES), **changes)
    fitted.fit(model)
    return model, fitted, saved


def test_the_mean_of_the_best_wins_if_it_is_better(tmp_path: Path) -> None:
    callback = CheckpointAveraging(top=3)
    model, fitted, _ = _fit(tmp_path, callback)
    # The best three of .6 (2.0), 1.4 (4.0), 1.6 (1.0): their mean 7/3 is at .267.
    assert model.net.weight.item() == pytest.approx(7 / 3)
    assert callback.score == pytest.approx(2.6 - 7 / 3)
    assert float(fitted.callback_metrics["averaging/val_loss"]) == pytest.approx(callback.score)
    assert float(fitted.callback_metrics["val_loss"]) == pytest.approx(4.4)
    assert [Path(path).stem for path in callback.kept] == ["epoch=3", "epoch=1", "epoch=2"]
    assert Path(callback.path) == tmp_path / "average-of-best-3.ckpt" == Path(callback.best_path)
    assert "optimizer_states" not in torch.load(callback.path, weights_only=True)
    assert_equal(_state(callback.path), snapshot(model))
    assert model.ended_with["net.weight"].item() == 7.0  # raw weights were back in time for the last files
    validated = fitted.validate(model, ckpt_path=callback.path, verbose=False)
    assert validated[0]["val_loss"] == pytest.approx(callback.score)
    _fit(tmp_path, again := CheckpointAveraging(top=3))
    assert Path(again.path).name == "average-of-best-3-v1.ckpt"  # an earlier run's is not overwritten


def test_the_best_checkpoint_wins_if_the_mean_is_worse(tmp_path: Path) -> None:
    callback = CheckpointAveraging(top=3)
    model, _, saved = _fit(tmp_path, callback, target=2.0)
    assert model.net.weight.item() == 2.0
    assert callback.best_path == saved.best_model_path
    assert callback.score == pytest.approx(1 / 3)


def test_greedy_leaves_out_what_makes_it_worse(tmp_path: Path) -> None:
    callback = CheckpointAveraging(top=3, greedy=True)
    # Best 1.0 at 1.4 and 4.0 at 1.6 have their midpoint 2.5 at .1; 2.0 first at .4 with 1.0: 1.5 at .9, not better.
    model, _, _ = _fit(tmp_path, callback, target=2.9)
    assert [Path(path).stem for path in callback.kept] == ["epoch=3", "epoch=1"]
    assert model.net.weight.item() == pytest.approx(3.0)


def test_greedy_ends_with_the_best_if_the_models_are_not_mode_connected(tmp_path: Path) -> None:
    class TwoBasins(Scripted):
        def validation_step(self, batch, batch_idx) -> None:
            self.log("val_loss", 0.5 + ((self.net.weight - 1.1) * (self.net.weight - 9.0)).square().sum())

    model, callback = TwoBasins(VALUES, 0.0), CheckpointAveraging(top=2, greedy=True)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    with pytest.warns(UserWarning, match="ends with the best checkpoint: .*not linearly mode-connected"):
        trainer([callback, saved], enable_checkpointing=True, max_epochs=5).fit(model)
    assert model.net.weight.item() == 9.0
    assert (callback.path, callback.best_path) == ("", saved.best_model_path)


def test_it_goes_before_the_best_of_early_stopping_and_an_average(tmp_path: Path) -> None:
    callback = CheckpointAveraging(top=2)
    average = WeightAveraging(EMA(0.5, warmup=None))
    model, _, saved = _fit(tmp_path, callback, average, EarlyStopping("val_loss", patience=math.inf), keep=2)
    files = sorted(saved.best_k_models, key=lambda path: float(saved.best_k_models[path]))
    mean = average_checkpoints(files)
    assert_close(_state(callback.path), mean)
    wanted = callback.path if callback.score < float(saved.best_model_score) else saved.best_model_path
    assert_equal(snapshot(model), _state(wanted))
    assert callback.best_path == wanted


def test_statistics_of_the_mean_are_its_own(tmp_path: Path) -> None:
    model, callback = Model(make=norm_net), CheckpointAveraging(top=3)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3)
    fitted = fit(model, [callback, saved], enable_checkpointing=True, max_epochs=4)
    wanted = Model(make=norm_net)
    assert set(callback.kept) == set(saved.best_k_models)
    wanted.load_state_dict(average_checkpoints(callback.kept[::-1]))  # a count, which has no mean, is the best one's
    refresh_batchnorm_(wanted, data())
    assert_close(_state(callback.path), snapshot(wanted))
    score = fitted.validate(wanted, data(2, seed=1), verbose=False)[0]["val_loss"]
    assert score == pytest.approx(callback.score, rel=1e-4)


def test_one_checkpoint_is_what_the_fit_ends_with(tmp_path: Path) -> None:
    callback = CheckpointAveraging(top=3)
    model = Scripted([5.0], 1.0)
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3)
    trainer([callback, saved], enable_checkpointing=True, max_epochs=1).fit(model)
    assert (callback.path, callback.best_path) == ("", saved.best_model_path)
    assert model.net.weight.item() == 5.0


@pytest.mark.parametrize(
    ("saved", "changes"),
    [
        ([], {}),
        ([{"monitor": "val_loss", "save_top_k": 2}], {}),
        ([{"save_top_k": -1}], {}),
        ([{"monitor": "val_loss", "save_top_k": 3}], {"monitor": "accuracy"}),
    ],
)
def test_without_enough_checkpoints_it_is_refused(tmp_path: Path, saved, changes) -> None:
    callbacks = [ModelCheckpoint(tmp_path, **arguments) for arguments in saved]
    with pytest.raises(MisconfigurationException, match=r"\(top=3\) averages the checkpoints of a `Model"):
        fit(Model(), [CheckpointAveraging(top=3, **changes), *callbacks], enable_checkpointing=bool(saved))


def test_without_validation_it_is_refused(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3)
    with pytest.raises(MisconfigurationException, match="CheckpointAveraging validates the average"):
        fit(Model(), [CheckpointAveraging(top=3), saved], enable_checkpointing=True, limit_val_batches=0)


@pytest.mark.parametrize("arguments", [{"top": 1}, {"buffers": "copy"}, {"refresh_batches": 0}])
def test_arguments_are_refused(arguments) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        CheckpointAveraging(**arguments)


# ---- folders of shards ----


def _sharded(folder: str) -> list:
    from tests.harness.cells import Cell
    from tests.harness.models import build, full_weights

    saved = ModelCheckpoint(folder, monitor="val_loss", save_top_k=3)
    callback = CheckpointAveraging(top=3)
    module = build(Cell("automatic", "32-true", "fsdp2", "1"))
    two_processes([saved, callback], enable_checkpointing=True, max_epochs=3).fit(module)
    return [full_weights(module), list(saved.best_k_models), callback.path, callback.best_path, callback.score]


def test_folders_are_averaged_shard_by_shard_and_by_the_function(group: Group) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for final, paths, path, best, _ in group.run(_sharded, folder):
            mean = average_checkpoints(paths)
            assert all(os.path.isdir(one) for one in (*paths, path))
            assert_close(average_checkpoints([path]), mean)
            assert_close(final, average_checkpoints([best]))
            states = [average_checkpoints([one]) for one in paths]
            for one, other in itertools.pairwise(states):
                assert any((one[name] - other[name]).abs().max() > 1e-5 for name in one)
            assert_close(mean, average_weights(states))
