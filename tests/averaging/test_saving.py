"""While the Trainer saves, the module holds the weights of the checkpoint: the evaluated average."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_optim import (
    EMA,
    SWA,
    CheckpointAveraging,
    EarlyStopping,
    GradientAccumulation,
    WeightAveraging,
    averaged_state_dict,
)
from lightning_optim.averaging.training.averaged_weights import AveragedWeights
from tests.averaging.models import Model, assert_close, assert_equal, data, differ, ema, fit, mean, norm_net, snapshot
from tests.lightning import AsyncCheckpointIO, Callback, MisconfigurationException, ModelCheckpoint

DECAY = 0.8


def averaging(**arguments: Any) -> WeightAveraging:
    return WeightAveraging(arguments.pop("average", EMA(DECAY, warmup=None)), **arguments)


class Exports(Callback):
    """A callback that records the weights whenever a checkpoint is saved, with a state made of them."""

    def __init__(self, live: bool = False) -> None:
        self.live, self.seen = live, []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.module = pl_module

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.seen.append(snapshot(pl_module))

    def state_dict(self) -> dict[str, Any]:
        state = self.module.state_dict() if self.live else snapshot(self.module)
        return {"first": {"of": [state["net.0.weight"]]}, "count": len(self.seen)}


class Keeping(Model):
    """A model that records its weights whenever a checkpoint is saved."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.saved: list[dict[str, Tensor]] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved.append(snapshot(self))


class Saves(Callback):
    """A callback that saves at the first call of a hook in the second epoch."""

    def __init__(self, path: Path, hook: str, **options: Any) -> None:
        self.path, self.options = path, options
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and not self.path.exists():
            self.path.touch()
            trainer.save_checkpoint(self.path, **self.options)


HOOKS = [
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_before_zero_grad",
    "on_before_optimizer_step",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.float64}, {"average": SWA()}], ids=str)
def test_what_saves_itself_with_a_checkpoint_sees_the_weights_of_the_file(tmp_path, hook, arguments) -> None:
    model, exports = Keeping(make=norm_net), Exports()
    saves = Saves(tmp_path / "one.ckpt", hook)
    fit(model, [exports, averaging(**arguments), saves])
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert len(model.saved) == len(exports.seen) == 1
    assert_equal(exports.seen[0], saved["state_dict"])
    assert_equal(model.saved[0], saved["state_dict"])
    raw = saved["current_model_state"]
    assert differ(saved["state_dict"], raw)
    first = saved["callbacks"]["Exports"]["first"]["of"][0]
    assert torch.equal(first, raw["net.0.weight"]), "the state of a callback was not asked for beside the raw weights"
    fit(alone := Model(make=norm_net), [averaging(**arguments)])
    assert_equal(snapshot(model), snapshot(alone))


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_that_is_the_modules_storage_holds_raw_weights(tmp_path, hook, dtype) -> None:
    fit(Model(), [averaging(dtype=dtype), Exports(live=True), Saves(tmp_path / "one.ckpt", hook)])
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    first = saved["callbacks"]["Exports"]["first"]["of"][0]
    assert torch.equal(first, saved["current_model_state"]["net.0.weight"])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_weights_only(tmp_path, hook) -> None:
    model, exports = Keeping(), Exports()
    fit(model, [averaging(), exports, Saves(tmp_path / "one.ckpt", hook, weights_only=True)])
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert "callbacks" not in saved
    assert_equal(model.saved[0], saved["state_dict"])
    assert_close(saved["state_dict"], ema(model.trajectory[: 9 if hook == "on_train_batch_end" else 16], DECAY))


def test_model_checkpoints_of_every_kind(tmp_path) -> None:
    """Every checkpoint of a run, also the best one of early stopping."""
    model, exports = Keeping(lr=0.2), Exports()
    files = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, filename="{step}")
    best = EarlyStopping("val_loss", dirpath=str(tmp_path / "best"))
    fit(model, [exports, averaging(), best, files], enable_checkpointing=True, max_epochs=3)
    for path, validated in zip([8, 16, 24], model.validated, strict=True):
        assert_equal(torch.load(tmp_path / f"step={path}.ckpt", weights_only=True)["state_dict"], validated)
    assert {_digest(seen) for seen in exports.seen} == {_digest(validated) for validated in model.validated}
    saved = torch.load(best.best_path, weights_only=True)["state_dict"]
    assert_equal(saved, model.validated[model.losses.index(min(model.losses))])


def _digest(state: dict[str, Tensor]) -> float:
    return float(sum(tensor.double().sum() for tensor in state.values()))


def test_what_another_thread_writes_is_what_was_in_the_module(tmp_path) -> None:
    model = Keeping()
    files = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(model, [averaging(), files], enable_checkpointing=True, plugins=[AsyncCheckpointIO()], max_epochs=1)
    assert len(model.saved) == 8
    for step, seen in enumerate(model.saved, 1):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert_equal(saved["state_dict"], seen)
        assert_equal(saved["current_model_state"], model.trajectory[step - 1])


def test_a_state_that_has_no_storage_is_saved_beside_an_average(tmp_path) -> None:
    class Sparse(Callback):
        state_key = "sparse"
        held = torch.eye(3).to_sparse()

        def state_dict(self) -> dict[str, Any]:
            return {"held": self.held}

    class Embeds(Model):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(5, 1, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.table(torch.tensor([batch_idx % 5])).square().sum()

    class Within(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.batch_idx}.ckpt")  # windows are open after most

    fit(Embeds(), [averaging(), GradientAccumulation(3), Sparse(), Within()], max_epochs=1)
    states = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]
    window = next(state for name, state in states.items() if name.startswith("GradientAccumulation"))
    assert any(isinstance(one, Tensor) and one.is_sparse for one in tree_leaves(window))
    assert torch.equal(states["sparse"]["held"].to_dense(), torch.eye(3))


def test_a_checkpoint_that_is_made_but_not_saved_holds_the_average(tmp_path) -> None:
    class Dumps(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.state = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["state_dict"])

    model, dumps = Keeping(), Dumps()
    fit(model, [averaging(), dumps])
    assert_close(dumps.state, ema(model.trajectory, DECAY))
    assert_equal(model.saved[-1], model.trajectory[-1])


# ---- several, and what goes wrong ----


@pytest.mark.parametrize("within", ["", "a", "b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_holds_the_evaluated_average_whichever_the_module_holds(tmp_path, within, dtype) -> None:
    a, b = averaging(dtype=dtype), averaging(average=SWA(), evaluate=False, dtype=dtype)

    class Within(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            held = {"a": a, "b": b}[within].averaged_weights(pl_module) if within else contextlib.nullcontext()
            with held:
                before = snapshot(pl_module)
                trainer.save_checkpoint(tmp_path / "one.ckpt")
                assert_equal(snapshot(pl_module), before)

    model, exports = Keeping(), Exports()
    fit(model, [exports, a, b, Within()], max_epochs=1)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_close(saved["state_dict"], ema(model.trajectory, DECAY))
    assert_equal(exports.seen[0], saved["state_dict"])
    assert_equal(saved["current_model_state"], model.trajectory[-1])
    assert torch.equal(saved["callbacks"]["Exports"]["first"]["of"][0], model.trajectory[-1]["net.0.weight"])


@pytest.mark.filterwarnings("ignore:.* has no effect")
def test_a_checkpoint_holds_raw_weights_before_the_evaluated_average_begins(tmp_path) -> None:
    """Also if the module holds another average then: training resumes from the raw weights."""
    other = averaging(average=SWA(), evaluate=False, apply_at_end=False)

    class Within(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with other.averaged_weights(pl_module):
                trainer.save_checkpoint(tmp_path / "one.ckpt")
                assert_close(snapshot(pl_module), mean(pl_module.trajectory))

    model = Model()
    fit(model, [averaging(start=100), other, Within()], max_epochs=1)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_equal(saved["state_dict"], model.trajectory[-1])
    assert_close(averaged_state_dict(tmp_path / "one.ckpt"), mean(model.trajectory))


def test_a_checkpoint_that_is_made_while_the_module_holds_another_average() -> None:
    """Statistics of the evaluated average are estimated for it, for which the other average goes out."""
    one, other = averaging(average=SWA()), averaging(evaluate=False)

    class Dumps(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with other.averaged_weights(pl_module):
                before = snapshot(pl_module)
                made = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)["state_dict"]
                self.made = copy.deepcopy(made)
                assert_equal(snapshot(pl_module), before)
            with one.averaged_weights(pl_module):
                self.averaged = snapshot(pl_module)

    dumps = Dumps()
    fit(Model(make=norm_net), [one, other, dumps], max_epochs=1, limit_train_batches=3)
    assert_equal(dumps.made, dumps.averaged)


def test_a_module_holds_one_average_at_a_time() -> None:
    """A second one is refused, and goes into a copy; after the fit each takes the place of the last."""
    one, other, copied, seen = averaging(), averaging(average=SWA(), evaluate=False), Model(), []

    class Nests(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            first = snapshot(pl_module)
            refused = pytest.raises(MisconfigurationException, match="put it into a copy of the module")
            with refused, other.averaged_weights(pl_module):
                raise AssertionError
            with other.averaged_weights(copied), one.averaged_weights(pl_module):
                seen.append(snapshot(copied))
                assert_equal(snapshot(pl_module), first)
            assert_equal(snapshot(pl_module), first)

    model = Model()
    fit(model, [one, other, Nests()])
    assert_close(seen[-1], mean(model.trajectory))
    for _ in range(2):
        assert_close(snapshot(model), ema(model.trajectory, DECAY))
        with other.averaged_weights(model):
            assert_close(snapshot(model), mean(model.trajectory))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float32"])
def test_an_exchange_back_that_fails_can_be_repeated(monkeypatch, dtype) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            raw, swap, calls = snapshot(pl_module), AveragedWeights._swap_, []

            def swap_until(weights: AveragedWeights, *arguments: Any) -> None:
                calls.append(arguments)
                if len(calls) == 4:
                    raise MemoryError
                swap(weights, *arguments)

            with callback.averaged_weights(pl_module):
                mean = snapshot(pl_module)
            with pytest.raises(MemoryError), callback.averaged_weights(pl_module), monkeypatch.context() as patch:
                averaged = snapshot(pl_module)
                patch.setattr(AveragedWeights, "_swap_", swap_until)
                callback._averaged.exchange_()
            assert_equal(snapshot(pl_module), raw)  # at the end of the context it is tried again
            assert_equal(averaged, mean)
            with callback.averaged_weights(pl_module):
                assert_equal(snapshot(pl_module), mean)

    callback = averaging(dtype=dtype)
    fit(Model(make=norm_net), [callback, Fails()], max_epochs=1, limit_train_batches=2)


def test_an_average_that_is_not_evaluated_stays_out(tmp_path) -> None:
    model, exports = Keeping(), Exports()
    fit(model, [exports, averaging(evaluate=False), Saves(tmp_path / "one.ckpt", "on_train_epoch_end")])
    assert_equal(exports.seen[0], model.trajectory[-1])


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_a_save_that_fails_leaves_raw_weights(tmp_path, hook) -> None:
    class Full(Exports):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            if len(self.seen) == 1:
                raise OSError("no space left")

    model, full = Keeping(), Full()
    files = ModelCheckpoint(tmp_path, save_on_exception=True, save_top_k=0)
    callbacks = [full, averaging(), Saves(tmp_path / "one.ckpt", hook), files]
    with pytest.raises(OSError, match="no space left"):
        fit(model, callbacks, enable_checkpointing=True)
    raw = snapshot(model)
    steps = 9 if hook == "on_train_batch_end" else 16
    assert_close(full.seen[0], ema([*model.trajectory, raw][:steps], DECAY))
    assert_equal(full.seen[1], full.seen[0])
    saved = torch.load(next(p for p in tmp_path.glob("*.ckpt") if p.name != "one.ckpt"), weights_only=True)
    assert_equal(saved["state_dict"], full.seen[0])
    assert_equal(saved["current_model_state"], raw)
    assert "state_dict" not in vars(full)


def test_a_save_within_a_step_of_manual_optimization(tmp_path) -> None:
    class Manual(Keeping):
        automatic_optimization = False
        path: Path | None = None

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = super().training_step(batch, batch_idx)
            if self.path and batch_idx == 5:
                self.trainer.save_checkpoint(self.path)  # between forward and backward
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    class Forward(WeightAveraging):
        def forward_batch(self, pl_module: Any, batch: Any) -> Any:
            return pl_module(batch[0])

    fit(alone := Manual(make=norm_net), [Forward(SWA())])
    saving = Manual(make=norm_net)
    saving.path = tmp_path / "one.ckpt"
    fit(saving, [Forward(SWA())])
    assert_equal(snapshot(saving), snapshot(alone))
    assert differ(saving.saved[0], saving.trajectory[4])


def test_a_mean_of_checkpoints_is_in_the_module_when_it_is_saved(tmp_path) -> None:
    """Although another average is evaluated, which must not take its place."""
    model = Keeping()
    files = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    means = CheckpointAveraging(top=2)
    fit(model, [averaging(), files, means], enable_checkpointing=True, max_epochs=3)
    saved = torch.load(means.path, weights_only=True)["state_dict"]
    assert_equal(model.saved[-1], saved)


@pytest.mark.parametrize("dirpath", [None, "best"])
@pytest.mark.parametrize("stops", [True, False])
def test_a_file_of_a_hook_after_the_end_holds_what_the_module_holds(tmp_path, stops: bool, dirpath: str | None) -> None:
    class Scripted(Keeping):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (3.0, 1.0, 2.0, 4.0)[self.current_epoch])

    class AtTheEnd(Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "one.ckpt")

    def callbacks() -> list[Callback]:
        stop = EarlyStopping("val_loss", patience=math.inf, dirpath=dirpath and str(tmp_path / dirpath))
        return [averaging(), *([stop] if stops else [])]

    fit(model := Scripted(), [*callbacks(), AtTheEnd()], max_epochs=3)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_equal(saved["state_dict"], snapshot(model))
    assert_equal(model.saved[-1], snapshot(model))
    fit(resumed := Scripted(), callbacks(), ckpt=tmp_path / "one.ckpt", max_epochs=4)
    fit(whole := Scripted(), callbacks(), max_epochs=4)
    assert_equal(resumed.trajectory[-1], whole.trajectory[-1])
    assert_equal(snapshot(resumed), snapshot(whole))


def test_outside_of_a_save_the_module_holds_raw_weights() -> None:
    class Looks(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.raw = snapshot(pl_module)
            with average.averaged_weights(pl_module):
                self.averaged = snapshot(pl_module)

    model, average, looks = Model(), averaging(), Looks()
    fit(model, [average, looks], train=data())
    assert_equal(looks.raw, model.trajectory[-1])
    assert_close(looks.averaged, ema(model.trajectory, DECAY))


def test_an_average_that_was_trained_on_is_said_to_be_lost() -> None:
    model, callback = Model(), averaging()
    fit(model, [callback])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.double().float()
        with callback.averaged_weights(model):
            assert_close(snapshot(model), ema(model.trajectory, DECAY))
    fit(model, max_epochs=1)
    with pytest.warns(UserWarning, match="its weights have been written to since: the average is lost"):
        callback.averaged_state()
