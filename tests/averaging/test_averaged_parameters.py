"""The parameters of an average while a model changes in the middle of a run, and over a resume."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lightning_optim import EMA, LAWA, SWA, EMAWeightAveraging, WeightAveraging
from tests.averaging.models import Model, Moving, assert_close, assert_equal, ema, fit, mean, norm_net, snapshot
from tests.lightning import Callback, ModelCheckpoint
from tests.lightning import WeightAveraging as TheirAveraging

DECAY = 0.8
AVERAGES = [EMA(DECAY, warmup=None), SWA(), LAWA(12)]


def averaging(**arguments: Any) -> WeightAveraging:
    return WeightAveraging(arguments.pop("average", EMA(DECAY, warmup=None)), **arguments)


class Saves(Callback):
    """A callback that saves at the end of an epoch."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def expected(states: list[dict[str, Tensor]], average: Any) -> dict[str, Tensor]:
    if isinstance(average, LAWA):
        return mean(states[-average.size :])
    return mean(states) if isinstance(average, SWA) else ema(states, DECAY)


def deep_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))


class Turns(Model):
    """A model whose layers are trainable in the epochs of ``plan``, all in one optimizer."""

    def __init__(self, plan: dict[int, tuple[int, ...]], adam: bool = False, begun: int = 0) -> None:
        super().__init__(make=deep_net)
        self.plan, self.adam = plan, adam
        self.net.requires_grad_(False)
        self._choose(begun)

    def _choose(self, epoch: int) -> None:
        for index, epochs in self.plan.items():
            self.net[index].requires_grad_(epoch in epochs)

    def on_train_epoch_start(self) -> None:
        self._choose(self.current_epoch)

    def configure_optimizers(self) -> Any:
        return (torch.optim.Adam if self.adam else torch.optim.SGD)(self.parameters(), lr=0.05)


# ---- the set of trainable parameters ----


@pytest.mark.parametrize("average", AVERAGES, ids=repr)
@pytest.mark.parametrize(
    "plan", [{0: (0, 2), 2: (1,), 4: (0, 1, 2)}, {0: (0,), 2: (1,), 4: (2,)}], ids=["and back", "in turn"]
)
def test_layers_that_take_turns_are_averaged_on(average: Any, plan: dict[int, tuple[int, ...]]) -> None:
    model, callback = Turns(plan), averaging(average=average)
    fit(model, [callback], max_epochs=3)
    assert_close(snapshot(model), expected(model.trajectory, average))
    for index, name in ((0, "net.0.weight"), (2, "net.2.weight")):
        assert not torch.equal(model.trajectory[-1][name], model.trajectory[0][name]), index


def test_what_never_trains_takes_no_memory() -> None:
    model, callback = Turns({0: (), 2: (1,), 4: (0, 1, 2)}), averaging()
    fit(model, [callback])
    assert list(callback.averaged_state()) == ["net.4.weight", "net.4.bias", "net.2.weight", "net.2.bias"]


@pytest.mark.parametrize("average", AVERAGES, ids=repr)
def test_parameters_that_come_with_another_optimizer_are_averaged(average: Any) -> None:
    class Unfreezes(Model):
        """A model whose optimizer is replaced, in the second epoch, by one that trains all of its layers."""

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=0.05)]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    fit(model := Unfreezes(), [averaging(average=average)])
    assert_close(snapshot(model), expected(model.trajectory, average))


class NewHead(Model):
    """A model whose head is replaced at the start of the second epoch, also in the parameter group."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[2] = nn.Linear(5, 1)
            self.first = snapshot(self)
            self.trainer.optimizers[0].param_groups[0]["params"] = list(self.parameters())


@pytest.mark.parametrize("average", AVERAGES, ids=repr)
def test_a_replaced_head_is_averaged_from_its_first_weights(tmp_path: Path, average: Any) -> None:
    model, callback = NewHead(), averaging(average=average)
    fit(model, [callback, Saves(tmp_path / "one.ckpt", 2)], max_epochs=3)
    of_head = [model.first] * 8 + model.trajectory[8:]
    wanted = expected(model.trajectory, average) | {
        name: value for name, value in expected(of_head, average).items() if name.startswith("net.2")
    }
    assert_close(snapshot(model), wanted)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert_close(saved["state_dict"], wanted)
    assert len(callback.averaged_state()) == 4


def test_a_layer_that_leaves_the_model_is_not_written_over_its_successor(tmp_path: Path) -> None:
    class Frozen(Model):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[0] = nn.Linear(6, 5).requires_grad_(False)  # and no optimizer hears of it
                self.net.new = snapshot(self.net[0])  # type: ignore[assignment]

    model = Frozen()
    fit(model, [averaging(), Saves(tmp_path / "one.ckpt", 1)])
    for found in (snapshot(model), torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]):
        assert torch.equal(found["net.0.weight"], model.net.new["weight"])
        assert_close(found, ema(model.trajectory, DECAY), ["net.2.weight"])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def test_parameters_that_are_renamed_in_mid_run_keep_their_average(tmp_path: Path) -> None:
    class Renamed(Model):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                register_parametrization(self.net[0], "weight", Doubled(), unsafe=True)

    model = Renamed(lr=0.01)
    fit(model, [averaging(), Saves(tmp_path / "one.ckpt", 1)])
    new, old = "net.0.parametrizations.weight.original", "net.0.weight"
    states = [{"weight": state[new if new in state else old]} for state in model.trajectory]
    for found in (snapshot(model), torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]):
        assert_close({"weight": found[new]}, ema(states, DECAY))


# ---- over a resume ----


PLANS = {
    "unfrozen": {0: (1, 2, 3), 2: (2, 3), 4: (0, 1, 2, 3)},
    "frozen": {0: (0,), 2: (0, 1), 4: (0, 1, 2, 3)},
    "both": {0: (0, 3), 2: (1, 2), 4: (0, 1, 2, 3)},
}


@pytest.mark.parametrize("begun", [0, 2])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: averaging(average=EMA(0.95)),
        lambda: averaging(average=SWA(), every=3),
        lambda: averaging(average=LAWA(20), dtype="float64"),
        lambda: averaging(average=SWA(), evaluate=False),
        lambda: EMAWeightAveraging(decay=0.9),
    ],
    ids=["EMA", "SWA", "LAWA", "not evaluated", "drop-in"],
)
def test_what_a_checkpoint_holds_an_average_of_is_averaged_on(
    tmp_path: Path, plan: str, begun: int, make: Callable[[], WeightAveraging]
) -> None:
    whole, average = Turns(PLANS[plan], adam=True), make()
    fit(whole, [average, Saves(tmp_path / "one.ckpt", 1)], max_epochs=4)
    resumed, other = Turns(PLANS[plan], adam=True, begun=begun), make()
    fit(resumed, [other], max_epochs=4, ckpt=tmp_path / "one.ckpt")
    assert_equal(snapshot(resumed), snapshot(whole))
    assert_equal(other.averaged_state(), average.averaged_state())
    assert_equal(resumed.validated[-1], whole.validated[-1])


def test_weights_that_lightnings_average_has_and_that_are_frozen_now_are_averaged_on(tmp_path: Path) -> None:
    plan, always = {0: (0, 1), 2: (2, 3), 4: (0, 1, 2, 3)}, {0: (0, 1), 2: (), 4: (0, 1)}
    first = Turns(always)
    fit(first, [TheirAveraging(), Saves(tmp_path / "one.ckpt", 1)])
    model, callback = Turns(plan), averaging(average=SWA(), buffers="average")
    fit(model, [callback], ckpt=tmp_path / "one.ckpt", max_epochs=4)
    assert_close(snapshot(model), mean(first.trajectory + model.trajectory))
    assert len(callback.averaged_state()) == 6


def test_statistics_of_a_layer_that_was_frozen_are_not_estimated_after_a_resume(tmp_path: Path) -> None:
    """The resumed run has the layer in training mode and no step left."""

    class Freezes(Model):
        def __init__(self) -> None:
            super().__init__(make=norm_net)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.current_epoch >= 1:
                self.net[1].eval()
            self.net[3].eval()  # dropout

    def run(*callbacks: Callback, **changes: Any) -> dict[str, Tensor]:
        model, average = Freezes(), averaging(average=SWA(), every=5, evaluate=False)
        fit(model, [average, *callbacks], max_epochs=3, **changes)
        return {**average.averaged_state(), **snapshot(model)}

    files = ModelCheckpoint(tmp_path, filename="one", every_n_train_steps=24)
    whole = run(files, enable_checkpointing=True)
    assert_equal(run(ckpt=tmp_path / "one.ckpt"), whole)


# ---- buffers that change ----


def _resized(step: int) -> Tensor:
    return torch.arange(float(step))


CHANGES: dict[str, Callable[[int], Tensor | None]] = {
    "grows": lambda step: torch.arange(float(step)),
    "shrinks": lambda step: torch.arange(20.0 - step),
    "goes": lambda step: torch.ones(1) if step < 5 else None,
    "comes back": lambda step: None if step % 3 == 0 else torch.full((1,), float(step)),
    "dtype": lambda step: torch.full((1,), step, dtype=torch.float32 if step < 5 else torch.float64),
    "to integers": lambda step: torch.full((1,), step, dtype=torch.float32 if step < 5 else torch.int64),
    "expanded": lambda step: torch.full((3,), 1.0 * step) if step < 5 else torch.full((1,), 1.0 * step).expand(3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(average=SWA(), every="epoch"),
        dict(average=LAWA(3), dtype="float64"),
        dict(average=SWA(), evaluate=False),
    ],
    ids=repr,
)
def test_a_buffer_that_changes_its_kind_is_the_latest(tmp_path: Path, change: str, arguments: dict[str, Any]) -> None:
    values = CHANGES[change]
    model = Model(make=lambda: Moving(values, torch.ones(3 if change == "expanded" else 1)))
    callback = averaging(**arguments)
    fit(model, [callback, Saves(tmp_path / "one.ckpt", 1)], val_check_interval=3)
    latest, unlike = values(16), arguments.get("every") != "epoch" or change != "comes back"
    for state in (snapshot(model), torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]):
        found = state.get("net.moving")
        if latest is None or found is None:
            assert latest is found
        else:  # a buffer that was alike after steps 8 and 16 has a mean
            assert torch.equal(found, latest if unlike else torch.full_like(latest, 12.0))
    with callback.averaged_weights(model):
        if unlike:
            assert model.net.moving is None if latest is None else torch.equal(model.net.moving, latest)


def test_a_buffer_that_is_resized_in_place_is_the_latest() -> None:
    class InPlace(Moving):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.moving.resize_(len(self.moving) + 1).fill_(1.0)
            return self.layer(x)

    model = Model(make=lambda: InPlace(_resized, torch.ones(1)))
    fit(model, [averaging()], val_check_interval=3)
    assert model.net.moving.tolist() == [1.0] * 17


def test_a_buffer_that_comes_later_is_the_latest_in_the_resumed_run_too(tmp_path: Path) -> None:
    class Later(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.zeros(1))
            self.late += 1.0

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.register_buffer("late", torch.zeros(1))

    whole, resumed = Later(), Later()
    fit(whole, [averaging(), Saves(tmp_path / "one.ckpt", 1)], max_epochs=3)
    fit(resumed, [averaging()], ckpt=tmp_path / "one.ckpt", max_epochs=3)
    assert whole.late.tolist() == resumed.late.tolist() == [24.0]
    assert_equal(snapshot(resumed), snapshot(whole))


def test_a_buffer_that_changes_within_a_validation_is_the_latest() -> None:
    class Grows(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", torch.zeros(2))

        def on_validation_epoch_end(self) -> None:
            self.bank = torch.full((len(self.bank) + 1,), 7.0)

    model, alone = Grows(), Grows()
    fit(model, [averaging()])
    fit(alone)
    assert model.bank.tolist() == alone.bank.tolist() == [7.0] * 4
    assert_equal(model.trajectory[-1], alone.trajectory[-1])


# ---- buffers that are not finite ----


@pytest.mark.parametrize("average", [EMA(DECAY), SWA(), LAWA(3)], ids=repr)
@pytest.mark.parametrize("becomes", ["finite", "infinite"])
def test_what_is_averaged_does_not_depend_on_a_value(tmp_path: Path, average: Any, becomes: str) -> None:
    def values(step: int) -> Tensor:
        known = step < 3 if becomes == "infinite" else step >= 11
        return torch.tensor([float(step), float(step) if known else -torch.inf])

    def run(*callbacks: Callback, **changes: Any) -> tuple[Model, WeightAveraging]:
        model = Model(make=lambda: Moving(values, torch.tensor([0.0, -torch.inf])))
        callback = averaging(average=average)
        fit(model, [callback, *callbacks], max_epochs=3, **changes)
        return model, callback

    whole, callback = run(Saves(tmp_path / "0.ckpt", 0), Saves(tmp_path / "1.ckpt", 1))
    for epoch in (0, 1):
        resumed, other = run(ckpt=tmp_path / f"{epoch}.ckpt")
        assert_equal(snapshot(resumed), snapshot(whole))
        assert_equal(other.averaged_state(), callback.averaged_state())
        assert "net.moving" in torch.load(tmp_path / f"{epoch}.ckpt", weights_only=True)["state_dict"]
    first, second = snapshot(whole)["net.moving"].tolist()
    assert 11.0 < first <= 23.0 if not isinstance(average, SWA) else first == pytest.approx(12.5)
    assert (11.0 < second < 24.0) if becomes == "finite" else second == -torch.inf


def test_elements_that_are_finite_have_a_mean_beside_those_that_are_not() -> None:
    def values(step: int) -> Tensor:
        return torch.tensor([[step, torch.inf], [-torch.inf, torch.nan]])

    model = Model(make=lambda: Moving(values, torch.zeros(2, 2)))
    fit(model, [averaging(dtype="float64")])
    found = model.net.moving
    wanted = ema([{"v": torch.tensor(float(step))} for step in range(1, 17)], DECAY)["v"]
    assert float(found[0, 0]) == pytest.approx(float(wanted))
    assert (found[0, 1], found[1, 0]) == (torch.inf, -torch.inf)
    assert found[1, 1].isnan()


# ---- checkpoints that leave weights out ----


@pytest.mark.parametrize("after", [True, False])
def test_a_frozen_base_that_the_module_keeps_out_of_its_files_stays_out(tmp_path: Path, after: bool) -> None:
    class Stripped(Model):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(300, 300).requires_grad_(False)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for name in [name for name in checkpoint["state_dict"] if name.startswith("base")]:
                del checkpoint["state_dict"][name]

    model, path = Stripped(), tmp_path / "one.ckpt"
    fitted = fit(model, [averaging(), *([] if after else [Saves(path, 1)])])
    if after:
        fitted.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert os.path.getsize(path) < 50_000
    assert saved["current_model_state"].keys() == saved["state_dict"].keys()
    assert_equal(saved["current_model_state"], {n: v for n, v in model.trajectory[-1].items() if "base" not in n})
    assert "save_checkpoint" not in vars(fitted.strategy)
    resumed = Stripped()
    fit(resumed, [averaging()], ckpt=path, max_epochs=3)
    assert_close(snapshot(resumed.net), ema([*_net(model), *_net(resumed)], DECAY))


def _net(model: Model) -> list[dict[str, Tensor]]:
    return [{n.removeprefix("net."): v for n, v in s.items() if n.startswith("net.")} for s in model.trajectory]


def test_a_state_dict_that_the_user_overrides_has_no_part_in_what_is_averaged(tmp_path: Path) -> None:
    class Partial(Model):
        strict_loading = False

        def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
            return {name: value for name, value in super().state_dict().items() if name.startswith("net.2")}

    whole, resumed = Partial(), Partial()
    states: list[dict[str, Tensor]] = []

    class Keeps(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
            states.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    fit(whole, [Keeps(), averaging(), Saves(tmp_path / "one.ckpt", 1)])
    assert_close(dict(whole.named_parameters()), ema(states, DECAY))
    fit(resumed, [Keeps(), averaging()], ckpt=tmp_path / "one.ckpt", max_epochs=3)
    assert_close(dict(resumed.named_parameters()), ema(states, DECAY), ["net.2.weight", "net.2.bias"])
