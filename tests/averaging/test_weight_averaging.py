"""The same averaged weights in validation, checkpoints, restoring, test and predict, and none lost."""

from __future__ import annotations

import contextlib
import copy
import pickle
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_optim import (
    EMA,
    LAWA,
    SWA,
    Average,
    EarlyStopping,
    WeightAveraging,
    averaged_state_dict,
    refresh_batchnorm_,
)
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
)
from tests.lightning import Callback, MisconfigurationException, ModelCheckpoint

DECAY = 0.8


def averaging(**arguments) -> WeightAveraging:
    return WeightAveraging(arguments.pop("average", EMA(DECAY, warmup=None)), **arguments)


# ---- the formula, and when ----


def test_an_ema_is_the_sum_over_the_trajectory() -> None:
    model = Model()
    fit(model, [averaging()])
    assert_close(snapshot(model), ema(model.trajectory, DECAY))
    assert differ(snapshot(model), model.trajectory[-1])


def test_swa_at_each_epochs_end_is_the_mean_and_is_validated() -> None:
    model = Model()
    fit(model, [averaging(average=SWA(), every="epoch")], max_epochs=4)
    ends = model.trajectory[7::8]
    assert_close(snapshot(model), mean(ends))
    for epoch, validated in enumerate(model.validated):
        assert_close(validated, mean(ends[: epoch + 1]))


def test_lawa_is_the_mean_of_the_last() -> None:
    model = Model()
    fit(model, [averaging(average=LAWA(3))])
    assert_close(snapshot(model), mean(model.trajectory[-3:]))


@pytest.mark.parametrize(("start", "first"), [(0, 0), (5, 5), (0.25, 4), (0.0, 0)])
@pytest.mark.parametrize("every", [1, 3])
def test_start_and_every(start: int | float, first: int, every: int) -> None:
    model = Model()
    fit(model, [averaging(average=SWA(), start=start, every=every)])
    assert_close(snapshot(model), mean(model.trajectory[first::every]))


def test_an_epoch_that_max_steps_cuts_short_ends_there() -> None:
    model = Model()
    fit(model, [averaging(average=SWA(), every="epoch")], max_epochs=-1, max_steps=20)
    assert_close(snapshot(model), mean([model.trajectory[7], model.trajectory[15], model.trajectory[19]]))


def test_an_epoch_that_the_user_ends_early_counts() -> None:
    model = Model()
    model.on_train_batch_start = lambda batch, batch_idx: -1 if batch_idx == 5 else None  # type: ignore[method-assign]
    fit(model, [averaging(average=SWA(), every="epoch")])
    assert_close(snapshot(model), mean([model.trajectory[4], model.trajectory[9]]))


# ---- one truth ----


class Bare(ModelCheckpoint):
    """A second callback of another class, since Lightning refuses two of one class."""


def _states(tmp_path, **arguments):
    model = Model(make=norm_net)
    files = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}", save_last=True)
    bare = Bare(tmp_path / "bare", monitor="val_loss", save_weights_only=True)
    fitted = fit(model, [averaging(**arguments), files, bare], enable_checkpointing=True, max_epochs=3)
    return model, fitted, files, bare


@pytest.mark.parametrize("average", [EMA(DECAY), SWA(), LAWA(2)], ids=repr)
def test_every_file_holds_what_was_validated(tmp_path, average) -> None:
    model, _, files, bare = _states(tmp_path, average=average)
    assert differ(model.validated[-1], model.trajectory[-1])
    for epoch, validated in enumerate(model.validated):
        saved = torch.load(tmp_path / f"step={8 * (epoch + 1)}.ckpt", weights_only=True)
        assert_equal(saved["state_dict"], validated)
        assert_equal(saved["current_model_state"], model.trajectory[8 * (epoch + 1) - 1])
    best = min(range(3), key=lambda epoch: model.losses[epoch])
    assert_equal(torch.load(bare.best_model_path, weights_only=True)["state_dict"], model.validated[best])
    assert_equal(snapshot(model), model.validated[-1])
    assert_equal(torch.load(files.last_model_path, weights_only=True)["state_dict"], model.validated[-1])


def test_test_predict_and_load_use_the_same_weights(tmp_path) -> None:
    model, fitted, files, _ = _states(tmp_path)
    best = files.best_model_path
    wanted = min(model.losses)
    for run in (fitted, trainer([averaging()])):
        for evaluate in (run.test, run.validate):
            found = evaluate(model, data(2, seed=1), ckpt_path=best, verbose=False)
            assert found[0]["val_loss"] == pytest.approx(wanted)
    predicted = fitted.predict(model, data(2, seed=1), ckpt_path=best)
    loaded = Model.load_from_checkpoint(best, net=norm_net()).eval()
    x = next(iter(data(2, seed=1)))[0]
    torch.testing.assert_close(predicted[0], loaded(x))


def test_a_file_that_no_validation_preceded_holds_refreshed_statistics(tmp_path) -> None:
    model = Model(make=norm_net)
    files = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(model, [averaging(average=SWA()), files], enable_checkpointing=True, max_epochs=1)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    wanted = Model(make=norm_net)
    wanted.load_state_dict(saved)
    refresh_batchnorm_(wanted, data())
    assert_close(saved, snapshot(wanted))
    assert differ({"v": saved["net.1.running_var"]}, {"v": model.trajectory[2]["net.1.running_var"]})


class Slowing(Average):
    """A user's policy: each update moves the average by less than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("share", 1.0)

    def _share(self, step: int) -> float:
        self.share *= 0.7
        return self.share


@pytest.mark.parametrize("average", [EMA(DECAY), SWA(), LAWA(2), Slowing()], ids=repr)
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, average) -> None:
    whole, _, _, _ = _states(tmp_path, average=average)
    model = Model(make=norm_net)
    # The random state of dropout is not what this is about.
    torch.manual_seed(5)
    fit(model, [averaging(average=average)], ckpt=tmp_path / "step=8.ckpt", max_epochs=1)
    assert_equal(snapshot(model), whole.validated[0])


@pytest.mark.parametrize("average", [EMA(DECAY), EMA(DECAY, warmup=0.7), SWA(), LAWA(3), Slowing()], ids=repr)
@pytest.mark.parametrize("every", [1, "epoch"])
def test_resuming_at_an_epochs_end(tmp_path, average, every) -> None:
    runs = {}
    for name in ("whole", "first", "second"):
        model = Model(make=lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
        files = ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{epoch}")
        fit(
            model,
            [averaging(average=copy.deepcopy(average), every=every), files],
            enable_checkpointing=True,
            max_epochs=2 if name == "first" else 4,
            ckpt=tmp_path / "first" / "epoch=1.ckpt" if name == "second" else None,
        )
        runs[name] = model
    assert_equal(snapshot(runs["second"]), snapshot(runs["whole"]))
    for resumed, validated in zip(runs["second"].validated[-2:], runs["whole"].validated[-2:], strict=True):
        assert_equal(resumed, validated)


# ---- nothing lost ----


class Failing(Model):
    fails = True

    def on_validation_batch_end(self, *args) -> None:
        if self.fails and self.trainer.current_epoch == 1:
            raise RuntimeError("as planned")


def test_an_exception_in_validation_leaves_raw_weights_and_a_file_that_resumes(tmp_path) -> None:
    model = Failing(make=norm_net)
    files = ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0)
    with pytest.raises(RuntimeError, match="as planned"):
        fit(model, [averaging(average=SWA()), files], enable_checkpointing=True)
    assert_equal(snapshot(model), model.trajectory[-1])
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    assert_close(saved["state_dict"], mean(model.trajectory), [n for n, p in model.named_parameters()])
    assert_equal(saved["current_model_state"], model.trajectory[-1])


def test_an_interrupt_within_the_exchange_waits(request: pytest.FixtureRequest) -> None:
    from lightning_optim.runtime.interrupts import uninterrupted

    # A process that was started in the background may ignore interrupts from its birth on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(1)
        done.append(2)
    assert done == [1]


def test_an_exchange_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, callback = Model(), averaging(apply_at_end=False)
    fit(model, [callback])
    raw, swaps = snapshot(model), []
    swap = callback._averaged._swap_

    def failing(*arguments) -> None:
        swaps.append(arguments)
        if len(swaps) == 3:
            raise MemoryError
        swap(*arguments)

    monkeypatch.setattr(callback._averaged, "_swap_", failing)
    with pytest.raises(MemoryError), callback.averaged_weights(model):
        pass
    assert_equal(snapshot(model), raw)
    assert len(swaps) == 5


class Saved(Callback):
    """Save at the end of the first epoch, while the module holds an average."""

    def __init__(self, path: Path, average: WeightAveraging | None) -> None:
        self.path, self.average = path, average

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 0:
            with self.average.averaged_weights(pl_module) if self.average else contextlib.nullcontext():
                trainer.save_checkpoint(self.path)


def _resumed(path: Path, *callbacks: WeightAveraging) -> list[dict[str, torch.Tensor]]:
    """Return the raw weights from which a run resumes, and those of each average."""
    found = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if not found:
                found.append(snapshot(pl_module))
                for callback in callbacks:
                    with callback.averaged_weights(pl_module):
                        found.append(snapshot(pl_module))

    fit(Model(), [*callbacks, Look()], ckpt=path, max_epochs=4)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("evaluates", "within"), [(True, "a"), (True, "b"), (False, "a"), (True, "")])
def test_a_file_that_is_written_within_averaged_weights_resumes(tmp_path, evaluates, within, dtype) -> None:
    def averages() -> dict[str, WeightAveraging]:
        return {
            "a": averaging(evaluate=evaluates, dtype=dtype),
            "b": averaging(average=SWA(), evaluate=False, apply_at_end=False, dtype=dtype),
        }

    model, run = Model(), averages()
    fit(model, [*run.values(), Saved(tmp_path / "one.ckpt", run.get(within))], max_epochs=1)
    raw, of_a, of_b = _resumed(tmp_path / "one.ckpt", *averages().values())
    assert_equal(raw, model.trajectory[-1])
    assert_close(of_a, ema(model.trajectory, DECAY))
    assert_close(of_b, mean(model.trajectory))
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_close(saved["state_dict"], of_a)
    assert_equal(saved["current_model_state"], raw)
    assert_close(averaged_state_dict(tmp_path / "one.ckpt"), of_a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apply", [True, False])
def test_a_file_that_is_written_after_the_fit_resumes(tmp_path, apply, dtype) -> None:
    model = Model()
    fitted = fit(model, [averaging(apply_at_end=apply, dtype=dtype)])
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    raw, averaged = _resumed(tmp_path / "one.ckpt", averaging(dtype=dtype))
    assert_equal(raw, model.trajectory[-1])
    assert_close(averaged, ema(model.trajectory, DECAY))


def test_a_file_that_is_written_after_an_exception_resumes(tmp_path) -> None:
    model = Failing()
    failed = trainer([averaging()])
    with pytest.raises(RuntimeError, match="as planned"):
        failed.fit(model, data(), data(2, seed=1))
    failed.save_checkpoint(tmp_path / "one.ckpt")
    raw, averaged = _resumed(tmp_path / "one.ckpt", averaging())
    assert_equal(raw, model.trajectory[-1])
    assert_close(averaged, ema(model.trajectory, DECAY))


@pytest.mark.filterwarnings("ignore:.* has no effect")
def test_an_average_that_never_started_is_never_used(tmp_path) -> None:
    model, alone = Model(), Model()
    files = ModelCheckpoint(tmp_path, filename="one")
    fit(model, [averaging(start=1000), files], enable_checkpointing=True)
    fit(alone)
    assert_equal(snapshot(model), snapshot(alone))
    assert model.losses == alone.losses
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_equal(saved["state_dict"], model.trajectory[-1])


def test_a_second_fit_and_another_module_start_anew() -> None:
    callback = averaging()
    for model in (Model(), Model(lr=0.01)):
        fit(model, [callback])
        assert_close(snapshot(model), ema(model.trajectory, DECAY))


def test_early_stopping_restores_the_best_average() -> None:
    model = Model(lr=0.5)
    fit(model, [averaging(average=SWA(), every="epoch"), EarlyStopping("val_loss", patience=1)], max_epochs=10)
    assert_equal(snapshot(model), model.validated[model.losses.index(min(model.losses))])


# ---- the context manager ----


def test_averaged_weights_in_the_users_own_code() -> None:
    model, callback = Model(), averaging(apply_at_end=False)
    fit(model, [callback])
    raw = snapshot(model)
    assert_equal(raw, model.trajectory[-1])
    other = Model()
    own = snapshot(other)
    for module, before in ((model, raw), (other, own)):
        with callback.averaged_weights(module):
            assert_close(snapshot(module), ema(model.trajectory, DECAY))
        assert_equal(snapshot(module), before)
    stranger = nn.Linear(1, 1)
    with (
        pytest.raises(ValueError, match=r"must have the parameters of the averaged .* has no"),
        callback.averaged_weights(stranger),
    ):
        pass


def test_the_average_may_be_used_between_forward_and_backward(tmp_path) -> None:
    def run(*callbacks: Callback) -> Model:
        model = Model(make=norm_net)
        fit(model, callbacks, max_epochs=1)
        return model

    class Between(Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None:
            with callback.averaged_weights(pl_module):
                pass
            trainer.save_checkpoint(tmp_path / "one.ckpt")  # estimates statistics anew

    callback = averaging(average=SWA(), apply_at_end=False)
    assert_equal(snapshot(run(callback, Between())), snapshot(run()))


def test_another_module_gets_the_average_also_while_the_model_holds_it() -> None:
    model, callback, other = Model(), averaging(), Model(lr=0.0)
    fit(model, [callback])
    with callback.averaged_weights(other):
        assert_equal(snapshot(other), snapshot(model))
    with callback.averaged_weights(model), callback.averaged_weights(other):
        assert_close(snapshot(other), ema(model.trajectory, DECAY))


@pytest.mark.filterwarnings("ignore:.* has no effect")
def test_averaged_weights_before_the_start_are_the_raw_ones() -> None:
    model, callback = Model(), averaging(start=1000)
    with callback.averaged_weights(model):
        pass
    fit(model, [callback])
    before = snapshot(model)
    with callback.averaged_weights(model):
        assert_equal(snapshot(model), before)


def test_copies_of_the_callback_hold_the_average_and_not_the_model() -> None:
    model, callback = Model(), averaging()
    fit(model, [callback])
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert copied._averaged is None
        assert_close(copied.extra_state()["raw"], model.trajectory[-1])
        resumed = Model()
        fit(resumed, [copied])
        assert_close(snapshot(resumed), ema(resumed.trajectory, DECAY))


# ---- several ----


def test_several_averages_keep_their_own_weights(tmp_path) -> None:
    model = Model()
    slow, fast = averaging(), averaging(average=EMA(0.5, warmup=None), evaluate=False, name="fast")
    lawa = averaging(average=LAWA(2), evaluate=False)
    files = ModelCheckpoint(tmp_path, filename="one")
    fit(model, [fast, slow, lawa, files], enable_checkpointing=True)
    wanted = {None: ema(model.trajectory, DECAY), "fast": ema(model.trajectory, 0.5)}
    for name, averaged in wanted.items():
        assert_close(averaged_state_dict(tmp_path / "one.ckpt", name), averaged)
    with fast.averaged_weights(Model()) as _, lawa.averaged_weights(other := Model()):
        assert_close(snapshot(other), mean(model.trajectory[-2:]))
    assert_close(snapshot(model), wanted[None])
    resumed = Model()
    again = [averaging(average=EMA(0.5, warmup=None), evaluate=False, name="fast", apply_at_end=True)]
    fit(resumed, again, ckpt=tmp_path / "one.ckpt", max_epochs=3)
    assert_close(snapshot(resumed), ema([*model.trajectory, *resumed.trajectory], 0.5))
    with pytest.raises(ValueError, match="does not hold exactly one average with `name='none'`"):
        averaged_state_dict(tmp_path / "one.ckpt", "none")


def test_without_an_evaluated_average_validation_sees_raw_weights() -> None:
    model, alone = Model(), Model()
    fit(model, [averaging(evaluate=False)])
    fit(alone)
    assert model.losses == alone.losses
    assert_close(snapshot(model), ema(model.trajectory, DECAY))


def test_two_evaluated_averages_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Two averages have `evaluate=True`"):
        fit(Model(), [averaging(), averaging(average=SWA())])
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([averaging(), averaging(evaluate=False)])


def test_two_averages_that_the_module_would_end_with_are_refused() -> None:
    short = averaging(average=EMA(0.5, warmup=None), evaluate=False)
    long = averaging(average=SWA(), evaluate=False)
    for callbacks in ([short, long], [long, short]):
        with pytest.raises(MisconfigurationException, match=r"2 averages .* give the rest `apply_at_end=False`"):
            fit(Model(), callbacks)
    beside = averaging(average=SWA(), evaluate=False, apply_at_end=False)
    for callbacks in ([beside, short], [short, beside]):
        fit(model := Model(), callbacks)
        assert_close(snapshot(model), ema(model.trajectory, 0.5))
    fit(model := Model(), [short, averaging(name="evaluated"), long])
    assert_close(snapshot(model), ema(model.trajectory, DECAY))


# ---- raw against averaged ----


def test_compare_validates_both_and_plots() -> None:
    callback = averaging(compare=True)
    heard: list[str] = []

    class Hears(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            heard.append(f"{float(trainer.callback_metrics['val_loss']):.6f}")

    fit(model := Model(make=norm_net), [callback, Hears()])
    fit(alone := Model(make=norm_net), [averaging()])
    assert_equal(snapshot(model), snapshot(alone))  # nothing else changed: no draw, no statistic
    assert heard == [f"{loss:.6f}" for loss in alone.losses]
    assert model.losses[1::2] == alone.losses
    points = callback.comparison.points
    assert [point["step"] for point in points] == [8, 16]
    assert [point["averaged"]["val_loss"] for point in points] == alone.losses
    assert [point["raw"]["val_loss"] for point in points] == model.losses[::2]
    import matplotlib

    matplotlib.use("Agg")
    _, axes = callback.plot()
    found = [(point[kind]["val_loss"], kind, point["step"]) for point in points for kind in ("raw", "averaged")]
    best, kind, step = min(found)
    assert [line.get_label() for line in axes.get_lines()][:2] == ["raw", "averaged"]
    assert axes.get_lines()[2].get_label() == f"best {best:.4g}, {kind}, step {step}"
    assert list(axes.get_lines()[1].get_ydata()) == alone.losses
    with pytest.raises(ValueError, match="must be one of 'val_loss', got 'accuracy'"):
        callback.plot("accuracy")
    with pytest.raises(RuntimeError, match="There is nothing to plot"):
        averaging().plot()


# ---- refusals ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"average": "ema"}, "`average` must be an average, such as EMA\\(0.999\\), got 'ema'"),
        ({"start": -1}, "`start` must be an integer >= 0, got -1"),
        ({"start": 1.5}, r"`start` must be a number in \[0.0, 1.0\], got 1.5"),
        ({"every": 0}, '`every` must be an integer >= 1 or "epoch", got 0'),
        ({"every": "batch"}, "`every` must be an integer >= 1 or \"epoch\", got 'batch'"),
        ({"dtype": torch.int64}, "`dtype` must be a floating dtype of 16 bits or more"),
        ({"dtype": "float7"}, "`dtype` must be a floating dtype of 16 bits or more"),
        ({"buffers": "never"}, '`buffers` must be "average", "refresh", "copy" or None, got \'never\''),
        ({"refresh_batches": 0}, "`refresh_batches` must be an integer >= 1, got 0"),
        ({"refresh_loader": iter([1])}, "can be read only once"),
        ({"refresh_loader": 3}, "`refresh_loader` must be a loader of batches, which can be iterated, got 3"),
        ({"device": "nonsense"}, "`device` must be one that torch knows, .*, got 'nonsense'"),
        ({"device": 1.5}, "`device` must be one that torch knows, .*, got 1.5"),
        ({"compare": True, "evaluate": False}, "got `evaluate=False`"),
    ],
)
def test_arguments_are_refused(arguments, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        averaging(**arguments)


def test_a_fraction_without_an_end_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="the length of this run is unknown"):
        fit(Model(), [averaging(start=0.5)], max_epochs=-1)


def test_plain_net_has_nothing_to_refresh() -> None:
    model = Model(make=plain_net)
    seen = []
    model.net.register_forward_hook(lambda *_: seen.append(model.training))
    fit(model, [averaging(average=SWA())], max_epochs=1)
    assert len(seen) == 8 + 2
