"""Callbacks with Lightning's names: what is the same, what is fixed, and checkpoints in both directions."""

from __future__ import annotations

import jsonargparse
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR

from lightning_optim import EMA, LAWA, SWA, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from tests.averaging.models import Model, assert_close, assert_equal, differ, ema, fit, mean, norm_net, snapshot
from tests.harness.yaml_parsing import instantiate
from tests.lightning import Callback, EarlyStopping, MisconfigurationException, ModelCheckpoint
from tests.lightning import EMAWeightAveraging as TheirEMA
from tests.lightning import StochasticWeightAveraging as TheirSWA
from tests.lightning import WeightAveraging as TheirAveraging

DECAY = 0.8
PARAMETERS = [name for name, _ in Model().named_parameters()]


# ---- EMAWeightAveraging ----


@pytest.mark.parametrize("arguments", [{}, {"update_starting_at_step": 5}, {"use_buffers": True}], ids=str)
def test_ema_agrees_with_lightning(arguments) -> None:
    ours, theirs = Model(), Model()
    fit(ours, [EMAWeightAveraging(decay=DECAY, **arguments)])
    fit(theirs, [TheirEMA(decay=DECAY, **arguments)])
    assert_close(snapshot(ours), snapshot(theirs))
    assert differ(snapshot(ours), ours.trajectory[-1])


@pytest.mark.parametrize(("start", "updates"), [(None, [0, 3, 6, 9, 12, 15]), (4, [6, 9, 12, 15])])
def test_every_k_steps_forgets_as_fast(start, updates) -> None:
    model = Model()
    fit(model, [EMAWeightAveraging(decay=DECAY, update_every_n_steps=3, update_starting_at_step=start)])
    assert_close(snapshot(model), ema([model.trajectory[step] for step in updates], DECAY**3))


def test_starting_at_an_epoch_starts_there() -> None:
    model = Model()
    fit(model, [EMAWeightAveraging(decay=DECAY, update_starting_at_epoch=1)])
    assert_close(snapshot(model), ema(model.trajectory[8:], DECAY))
    assert_close(model.validated[0], model.trajectory[7])


def test_buffers_that_are_not_averaged_are_the_latest() -> None:
    model = Model(make=norm_net)
    fit(model, [EMAWeightAveraging(decay=DECAY, use_buffers=False)])
    for name in ("net.1.running_mean", "net.1.running_var"):
        assert torch.equal(snapshot(model)[name], model.trajectory[-1][name])


# ---- StochasticWeightAveraging ----


@pytest.mark.parametrize(("start", "first"), [(1, 0), (3, 2), (0.5, 1), (0.0, 0)])
def test_swa_is_the_mean_of_the_epochs_ends_the_last_included(start, first) -> None:
    model = Model()
    fit(model, [StochasticWeightAveraging(swa_epoch_start=start)], max_epochs=4)
    assert_close(snapshot(model), mean(model.trajectory[7::8][first:]))
    assert model.losses[-1] != model.losses[0]


def test_swa_after_an_early_stop_and_at_max_steps() -> None:
    stopped = Model()
    stop = EarlyStopping("val_loss", stopping_threshold=100.0)
    fit(stopped, [StochasticWeightAveraging(swa_epoch_start=1), stop], max_epochs=9)
    assert len(stopped.trajectory) == 8
    assert_close(snapshot(stopped), mean(stopped.trajectory[7:]))
    limited = Model()
    fit(limited, [StochasticWeightAveraging(swa_epoch_start=1)], max_epochs=-1, max_steps=19)
    assert_close(snapshot(limited), mean([limited.trajectory[index] for index in (7, 15, 18)]))


class Stopping(Callback):
    """A callback that stops in the middle of an epoch, as ``Trainer(max_time=…)`` does."""

    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._stop)

    def _stop(self, trainer, *_) -> None:
        trainer.should_stop |= trainer.global_step >= self.step


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("step", "ends"), [(4, [3]), (12, [7, 11])])
def test_swa_has_the_end_of_an_epoch_that_was_cut_short(hook: str, first: bool, step: int, ends: list[int]) -> None:
    model, callbacks = Model(), [StochasticWeightAveraging(swa_epoch_start=1), Stopping(step, hook)]
    fit(model, callbacks if first else callbacks[::-1], max_epochs=5, val_check_interval=0.5)
    assert_close(snapshot(model), mean([model.trajectory[end] for end in ends]))


def test_swa_estimates_statistics_without_a_step_and_an_epoch_more() -> None:
    model, alone = Model(make=norm_net), Model(make=norm_net)
    torch.manual_seed(1)
    run = fit(model, [StochasticWeightAveraging(swa_epoch_start=1)], max_epochs=3)
    torch.manual_seed(1)
    fit(alone, max_epochs=3)
    assert model.batches == alone.batches
    assert (run.current_epoch, run.max_epochs, len(model.losses)) == (3, 3, 3)
    assert_equal(model.trajectory[-1], alone.trajectory[-1])


class Scheduled(Model):
    """A model with a learning rate that falls at each step or epoch."""

    interval = "step"

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def on_before_optimizer_step(self, optimizer) -> None:
        self.rates = [*getattr(self, "rates", []), optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_users_schedule_stays_unless_a_rate_is_given(interval: str) -> None:
    model, alone = Scheduled(), Scheduled()
    model.interval = alone.interval = interval
    fit(model, [StochasticWeightAveraging(swa_epoch_start=1)])
    fit(alone)
    assert model.rates == alone.rates
    assert len(set(model.rates)) == (16 if interval == "step" else 2)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("epochs", [0, 1, 3])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_the_annealing_is_that_of_torch(strategy: str, epochs: int, interval: str) -> None:
    model = Scheduled()
    model.interval = interval
    callback = StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=epochs, annealing_strategy=strategy)
    fit(model, [callback], max_epochs=6)
    first = model.rates[8] if epochs else 0.1 * 0.9 ** (8 if interval == "step" else 1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=first)
    theirs = SWALR(optimizer, 0.02, anneal_epochs=epochs, anneal_strategy=strategy)
    for epoch in range(1, 6):
        assert model.rates[8 * epoch : 8 * epoch + 8] == pytest.approx([optimizer.param_groups[0]["lr"]] * 8)
        optimizer.step()
        theirs.step()


def test_the_rates_go_on_after_a_resume(tmp_path) -> None:
    whole, first, second = Scheduled(), Scheduled(), Scheduled()
    for model, epochs, ckpt in ((whole, 5, None), (first, 3, None), (second, 5, tmp_path / "epoch=2.ckpt")):
        callbacks = [StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=3)]
        if model is first:
            callbacks.append(ModelCheckpoint(tmp_path, filename="{epoch}"))
        fit(model, callbacks, max_epochs=epochs, ckpt=ckpt, enable_checkpointing=model is first)
    assert second.rates == whole.rates[24:]
    assert_equal(snapshot(second), snapshot(whole))


class Joined(Scheduled):
    """A callback that adds a second parameter group in an epoch, with another learning rate."""

    joins = 2

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net[2].parameters(), lr=0.1)
        if self.trainer.ckpt_path is not None:
            self._join(optimizer)
        return optimizer

    def _join(self, optimizer) -> None:
        optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 0.4})

    def on_train_epoch_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        if self.current_epoch == self.joins and len(optimizer.param_groups) == 1:
            self._join(optimizer)

    def on_before_optimizer_step(self, optimizer) -> None:
        self.rates = [*getattr(self, "rates", []), [group["lr"] for group in optimizer.param_groups]]


@pytest.mark.parametrize("lrs", [0.02, [0.02], 0.2])
@pytest.mark.parametrize("joins", [0, 2, 3])
def test_a_group_that_is_added_later_is_annealed_from_the_rate_it_came_with(lrs, joins: int) -> None:
    model = Joined()
    model.joins = joins
    fit(model, [StochasticWeightAveraging(lrs, swa_epoch_start=2, annealing_epochs=3)], max_epochs=7)
    last = lrs if isinstance(lrs, float) else lrs[-1]
    for group, first, begins in ((0, 0.1, 1), (1, 0.4, max(joins, 1))):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=first)
        theirs = SWALR(optimizer, last, anneal_epochs=3)
        for epoch in range(begins, 7):
            assert model.rates[8 * epoch][group] == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
    assert_close(snapshot(model), mean(model.trajectory[15::8]))


@pytest.mark.parametrize("lrs", [0.02, [0.02]])
def test_a_group_that_was_added_is_annealed_on_after_a_resume(tmp_path, lrs) -> None:
    whole, resumed = Joined(), Joined()
    for model, ckpt in ((whole, None), (resumed, tmp_path / "epoch=3.ckpt")):
        callbacks = [StochasticWeightAveraging(lrs, swa_epoch_start=2, annealing_epochs=4)]
        if model is whole:
            callbacks.append(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
        fit(model, callbacks, max_epochs=7, ckpt=ckpt, enable_checkpointing=model is whole)
    assert resumed.rates == whole.rates[32:]
    assert_equal(snapshot(resumed), snapshot(whole))


def test_a_function_in_place_of_the_mean() -> None:
    model = Model()
    callback = StochasticWeightAveraging(
        swa_epoch_start=1, avg_fn=lambda mean, weight, count: mean + 0.25 * (weight - mean)
    )
    fit(model, [callback], max_epochs=3)
    assert_close(snapshot(model), ema(model.trajectory[7::8], 0.75))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: EMAWeightAveraging(update_every_n_steps=0), "`update_every_n_steps` must be an integer >= 1, got 0"),
        (lambda: EMAWeightAveraging(update_starting_at_epoch=-1), "`update_starting_at_epoch` must be an integer >= 0"),
        (lambda: StochasticWeightAveraging(-0.1), "`swa_lrs` must be a number > 0.0, got -0.1"),
        (lambda: StochasticWeightAveraging([0.1, 0]), "`swa_lrs` must be a number > 0.0, got 0"),
        (lambda: StochasticWeightAveraging(0.1, 0), "`swa_epoch_start` must be an integer >= 1, got 0"),
        (lambda: StochasticWeightAveraging(0.1, 1.5), r"`swa_epoch_start` must be a number in \[0.0, 1.0\], got 1.5"),
        (lambda: StochasticWeightAveraging(0.1, 1, -1), "`annealing_epochs` must be an integer >= 0, got -1"),
        (lambda: StochasticWeightAveraging(0.1, annealing_strategy="step"), "`annealing_strategy` must be one of"),
        (lambda: StochasticWeightAveraging(0.1, avg_fn=3), "`avg_fn` must be a function, got 3"),
    ],
)
def test_arguments_are_refused(build, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize("rates", [[], [0.1, 0.2]])
def test_another_number_of_rates_than_groups_is_refused(rates: list[float]) -> None:
    with pytest.raises(MisconfigurationException, match="one rate for each of the 1 parameter groups of SGD"):
        fit(Model(), [StochasticWeightAveraging(rates)])


def test_a_fraction_without_max_epochs_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match="set `Trainer\\(max_epochs=…\\)`, or pass the epoch as an integer"
    ):
        fit(Model(), [StochasticWeightAveraging()], max_epochs=-1, max_steps=3)


# ---- checkpoints of Lightning's ----


def _saved(tmp_path, callbacks, name: str, **changes) -> str:
    model = Model(make=lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
    files = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
    fit(model, [*_listed(callbacks), files], enable_checkpointing=True, **changes)
    return tmp_path / name / "epoch=1.ckpt"


def _listed(callbacks) -> list[Callback]:
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _resumed(callbacks, ckpt, epochs: int = 4) -> Model:
    model = Model(make=lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
    fit(model, _listed(callbacks), ckpt=ckpt, max_epochs=epochs)
    return model


@pytest.mark.parametrize("kind", ["ema", "mean"])
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_a_run_goes_on_with_the_other(tmp_path, kind: str, direction: str) -> None:
    def ours():
        return EMAWeightAveraging(decay=DECAY) if kind == "ema" else WeightAveraging(SWA(), buffers="average")

    def theirs():
        return TheirEMA(decay=DECAY) if kind == "ema" else TheirAveraging()

    first, second = (theirs, ours) if direction == "theirs to ours" else (ours, theirs)
    mixed = _resumed(second(), _saved(tmp_path, first(), "mixed"))
    whole = _resumed(ours(), _saved(tmp_path, ours(), "whole"))
    for one, other in zip(mixed.trajectory, whole.trajectory, strict=True):
        assert_close(one, other, [name for name in one if not name.endswith("num_batches_tracked")])
    floats = [name for name, value in snapshot(whole).items() if value.is_floating_point()]
    assert_close(snapshot(mixed), snapshot(whole), floats)
    assert differ(snapshot(whole), whole.trajectory[-1])


@pytest.mark.parametrize("started", [0, 5])
def test_the_warm_up_goes_on_from_the_first_update_of_lightnings(tmp_path, started: int) -> None:
    """Lightning saves the number of updates; the steps say when the first one was."""
    path = _saved(tmp_path, TheirEMA(decay=DECAY, update_starting_at_step=started), "theirs")
    saved = torch.load(path, weights_only=True)
    first = 16 - int(saved["averaging_state"]["n_averaged"]) + 1
    assert first == started + 1
    model = _resumed(WeightAveraging(EMA(0.9999)), path, epochs=3)
    averaged = {name: saved["state_dict"][name].clone() for name in PARAMETERS}
    for step, weights in enumerate(model.trajectory, start=17):
        decay = 1.0 - (1.0 + step - first) ** (-2 / 3)
        averaged = {name: mean.lerp(weights[name], 1.0 - decay) for name, mean in averaged.items()}
    assert_close(snapshot(model), averaged, PARAMETERS)


@pytest.mark.filterwarnings("ignore:.* has no effect")
def test_an_average_of_lightnings_that_never_started_is_not_taken_for_one(tmp_path) -> None:
    path = _saved(tmp_path, TheirEMA(decay=DECAY, update_starting_at_step=1000), "never")
    saved = torch.load(path, weights_only=True)
    assert differ(saved["state_dict"], saved["current_model_state"])  # its initial weights
    model = _resumed(EMAWeightAveraging(decay=DECAY), path, epochs=3)
    alone = _resumed(WeightAveraging(EMA(DECAY), start=1000), path, epochs=3)
    assert_equal(model.trajectory[-1], alone.trajectory[-1])
    assert_close(snapshot(model), ema(model.trajectory, DECAY), PARAMETERS[:1])


@pytest.mark.parametrize("other", [SWA(), LAWA(2)], ids=repr)
def test_another_kind_of_average_starts_anew_from_the_raw_weights(tmp_path, other) -> None:
    path = _saved(tmp_path, WeightAveraging(EMA(DECAY)), "ema")
    model = _resumed(WeightAveraging(other, every="epoch", buffers="average"), path)
    whole = _resumed(WeightAveraging(EMA(DECAY)), path)
    assert_equal(model.trajectory[-1], whole.trajectory[-1])
    wanted = mean(model.trajectory[7::8])
    assert_close(
        snapshot(model), wanted, [name for name, value in snapshot(model).items() if value.is_floating_point()]
    )


@pytest.mark.filterwarnings("ignore:`EMAWeightAveraging.on_train_end` of .* writes its average into the module")
@pytest.mark.parametrize("theirs", [True, False])
@pytest.mark.parametrize("evaluate", [True, False])
def test_an_average_that_was_not_evaluated_goes_on_from_the_raw_weights(tmp_path, theirs, evaluate) -> None:
    """The checkpoint's ``state_dict`` is an average that the resumed run does not have, or does not evaluate."""
    first = TheirEMA(decay=DECAY) if theirs else EMAWeightAveraging(decay=DECAY)
    path = _saved(tmp_path, [first, WeightAveraging(SWA(), evaluate=False, buffers="average")], "mixed")
    alone = _resumed(EMAWeightAveraging(decay=DECAY), path)
    swa = WeightAveraging(SWA(), evaluate=evaluate, buffers="average")
    model = _resumed(swa, path)
    assert_equal(model.trajectory[-1], alone.trajectory[-1])
    assert swa._averaged.updates == 32


@pytest.mark.parametrize("evaluate", ["old", "new"])
def test_a_new_average_and_an_old_one_go_on_in_any_order(tmp_path, evaluate: str) -> None:
    path = _saved(tmp_path, [EMAWeightAveraging(decay=DECAY)], "one")
    whole = EMAWeightAveraging(decay=DECAY)
    wanted = _resumed(whole, path)
    old = EMAWeightAveraging(decay=DECAY, evaluate=evaluate == "old")
    new = WeightAveraging(SWA(), evaluate=evaluate == "new", buffers="average")
    model = _resumed([new, old], path)
    assert_equal(model.trajectory[-1], wanted.trajectory[-1])
    assert_equal(old.averaged_state(), whole.averaged_state())


@pytest.mark.parametrize("kind", [SWA(), EMA(DECAY, warmup=None)], ids=repr)
def test_lightnings_average_goes_on_without_being_evaluated(tmp_path, kind) -> None:
    path = _saved(tmp_path, [TheirEMA(decay=DECAY)], "theirs")
    callbacks = [WeightAveraging(kind, evaluate=evaluate, buffers="average") for evaluate in (True, False)]
    one, other = (_resumed(callback, path) for callback in callbacks)
    assert_equal(one.trajectory[-1], other.trajectory[-1])
    assert_equal(callbacks[0].averaged_state(), callbacks[1].averaged_state())


def test_swa_of_lightnings_goes_on(tmp_path) -> None:
    path = _saved(tmp_path, TheirSWA(0.05, swa_epoch_start=1, annealing_epochs=1), "theirs", max_epochs=5)
    theirs = torch.load(path, weights_only=False)["callbacks"]["StochasticWeightAveraging"]
    assert theirs["n_averaged"] == 2
    model = _resumed(StochasticWeightAveraging(swa_epoch_start=1), path)
    ends, average = model.trajectory[7::8], theirs["average_model_state"]
    for name in ("net.0.weight", "net.2.weight"):
        wanted = (2 * average[name] + ends[0][name] + ends[1][name]) / 4
        assert torch.allclose(snapshot(model)[name], wanted, atol=1e-6)


# ---- from YAML ----


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "{class_path: lightning_optim.WeightAveraging, init_args: {average: {class_path: lightning_optim.SWA},"
            " start: 0.75, every: epoch, dtype: float64, device: cpu, buffers: average, name: late}}",
            {"start": 0.75, "every": "epoch", "dtype": torch.float64, "buffers": "average", "name": "late"},
        ),
        (
            "{class_path: lightning_optim.WeightAveraging, init_args: {average: {class_path: lightning_optim.EMA,"
            " init_args: {half_life: 100}}, every: 4}}",
            {"every": 4, "dtype": torch.float32, "buffers": "average"},
        ),
        ("{class_path: lightning_optim.EMAWeightAveraging, init_args: {decay: 0.9}}", {"every": 1}),
        (
            "{class_path: lightning_optim.StochasticWeightAveraging, init_args: {swa_lrs: [0.1, 0.2], device: null}}",
            {"swa_lrs": [0.1, 0.2], "swa_epoch_start": 0.8, "device": None},
        ),
        (
            "{class_path: lightning_optim.CheckpointAveraging, init_args: {top: 3, greedy: true}}",
            {"top": 3, "greedy": True},
        ),
    ],
)
def test_from_yaml(text: str, wanted: dict) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    callback = instantiate(parser, parser.parse_args([f"--callback={text}"])).callback
    assert {name: getattr(callback, name) for name in wanted} == wanted
