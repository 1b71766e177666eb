"""GradientClipping: the gradients that a policy gets, and steps that are skipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning_utilities.core import rank_zero
from torch import Tensor

from lightning_optim import (
    AGC,
    AutoClip,
    Centralize,
    ClipByNorm,
    ClipByValue,
    GradientAccumulation,
    GradientClipping,
    ZClip,
)
from tests.harness import models, run
from tests.harness.cells import Cell
from tests.lightning import Callback, LightningModule, MixedPrecision, Trainer

CELL = Cell("automatic", "32-true", "single", "1")


class Bad(Callback):
    """Put a value into a gradient before the steps of some batches, and store weights and momentum around them."""

    def __init__(self, batches: set[int], value: float = math.nan) -> None:
        self.batches, self.value, self.seen = batches, value, -1
        self.before: list[Tensor] = []
        self.unchanged: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        self.before = self._everything(trainer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.seen in self.batches:
            parameter = next(p for p in pl_module.parameters() if p.grad is not None)
            parameter.grad.view(-1)[0] = self.value

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.seen in self.batches:
            now = self._everything(trainer)
            self.unchanged.append(all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True)))

    def _everything(self, trainer: Trainer) -> list[Tensor]:
        momenta = [s["momentum_buffer"] for opt in trainer.optimizers for s in opt.state.values()]
        return [t.detach().clone() for t in [*trainer.lightning_module.parameters(), *momenta]]


def _fit(clipping: GradientClipping, bad: Callback | None = None, cell: Cell = CELL, **changes: Any) -> Any:
    recorder = run.Recorder()
    callbacks = [clipping] if bad is None else [clipping, bad]
    if cell.accumulation > 1:
        callbacks.append(GradientAccumulation(cell.accumulation))
    trainer = run.make_trainer(cell, callbacks, **({"logger": recorder, "max_epochs": 3} | changes))
    module = models.build(cell)
    trainer.fit(module)
    return module, recorder.logged, trainer


# ---- which gradients -------------------------------------------------------------------------------------------------


class Spy(ClipByValue):
    """Store the shapes and the norm that it gets."""

    def __deepcopy__(self, memo: Any) -> Spy:
        return self

    def clip_(self, grads: Any, weights: Any = (), *, norm: Any = None, **others: Any) -> Any:
        self.saw = [tuple(grad.shape) for grad in grads]
        self.matched = all(grad.shape == weight.shape for grad, weight in zip(grads, weights, strict=True))
        self.norm = norm
        return norm


@pytest.mark.parametrize(
    ("selection", "shapes"),
    [
        ({}, [(1,), (5, 8), (5,), (3, 5), (3,)]),
        ({"on": "*.inner.*"}, [(5, 8), (5,)]),
        ({"exclude": "*bias"}, [(1,), (5, 8), (3, 5)]),
        ({"on": ["*weight"], "exclude": "*outer*"}, [(5, 8)]),
    ],
)
def test_a_policy_gets_the_selected_gradients(selection: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    spy = Spy(1.0, **selection)
    _fit(GradientClipping(spy))
    assert spy.saw == shapes
    assert spy.matched
    assert (spy.norm is None) == bool(selection), "a norm of all gradients is not that of some"


class Largest(Callback):
    """Store the largest element of the gradients of each step, after clipping."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen += [max(float(grad.abs().max()) for grad in grads)] if grads else []


def test_a_policy_after_one_that_acted_gets_no_norm() -> None:
    spy = Spy(1.0)
    _fit(GradientClipping([ClipByNorm(0.5), spy]))
    assert spy.norm is None


def test_a_policy_does_not_reuse_a_norm_of_another_type() -> None:
    """The first policy measures its norm and clips nothing; the second policy uses the largest element."""
    alone, second = Largest(), Largest()
    _fit(GradientClipping(ClipByNorm(0.05, norm_type=math.inf)), alone)
    _fit(GradientClipping([ClipByNorm(1e6), ClipByNorm(0.05, norm_type=math.inf)]), second)
    assert alone.seen == second.seen
    assert max(alone.seen) == pytest.approx(0.05, rel=1e-4)


def test_a_pattern_without_a_match_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`on='encoder.*'` matches no parameter"):
        _fit(GradientClipping(AGC(on="encoder.*")))


class Groups(models.Model):
    def configure_optimizers(self) -> Any:
        inner, outer = self.nets[0].get_submodule("inner"), self.nets[0].get_submodule("outer")
        rest = [self.nets[0].get_parameter("scale")]
        groups = [{"params": inner.parameters()}, {"params": [*outer.parameters(), *rest]}]
        return torch.optim.SGD(groups, lr=0.01)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        sizes = [[float(p.grad.square().sum()) for p in g["params"]] for g in optimizer.param_groups]
        self.norms = [math.sqrt(sum(group)) for group in sizes]


def test_each_param_group_has_its_own_norm() -> None:
    module = Groups(CELL)
    # The module's hook runs after the callbacks', so it sees clipped gradients.
    run.make_trainer(CELL, [GradientClipping(ClipByNorm(0.2, scope="group"))]).fit(module)
    assert module.norms == pytest.approx([0.2, 0.2], rel=1e-4)


class InTurn(models.Model):
    """In every second step the first group has no gradient, and in the other steps the second group."""

    configure_optimizers = Groups.configure_optimizers

    def on_after_backward(self) -> None:
        for parameter in self.optimizers().param_groups[self.seen % 2]["params"]:
            parameter.grad = None


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_a_history_knows_only_the_steps_in_which_there_was_a_gradient(scope: Any) -> None:
    clipping = GradientClipping([AutoClip(scope=scope, exclude="*.scale"), ZClip(scope=scope, warmup=100)])
    module = InTurn(CELL)
    run.make_trainer(CELL, [clipping]).fit(module)
    history, statistics = (policy.state_dict() for policy in clipping._copies[0])
    rows = history["recent"]["rows"]
    assert rows.shape == (8, 2 if scope == "group" else 4)
    assert rows.isfinite().sum(0).tolist() == [4] * rows.shape[1]
    assert rows.nan_to_num(1.0).min() > 0.0
    assert statistics["statistics"][0].tolist() == [4.0] * (2 if scope == "group" else 5)


# ---- skipped steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [ClipByNorm(0.5), ClipByValue(0.1), [Centralize(), AGC()]], ids=repr)
@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_a_skipped_step_leaves_everything_as_it_was(policy: Any, value: float, kind: Any) -> None:
    clipping, bad = GradientClipping(policy), Bad({1, 2, 7}, value)
    module, logged, _ = _fit(clipping, bad, Cell(kind, "32-true", "single", "1"))
    assert bad.unchanged == [True, True, True]
    assert clipping.skipped == [3]
    assert clipping.skipped_at == [[0, 0, 1], [0, 0, 2], [0, 1, 3]]
    assert clipping.steps == [9]
    assert all(p.isfinite().all() for p in module.parameters())
    counts = list(logged["gradients/skipped"].values())
    assert counts == [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]


def test_without_skipping_one_nan_is_in_every_weight() -> None:
    clipping, bad = GradientClipping(ClipByNorm(0.5), nonfinite="ignore"), Bad({1})
    module, *_ = _fit(clipping, bad)
    assert bad.unchanged == [False]
    assert not any(p.isfinite().any() for p in module.parameters())
    assert clipping.skipped == [0]


def test_a_skip_is_told_with_its_batch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=rank_zero.log.name):
        _fit(GradientClipping(0.5), Bad({6}))
    told = [record.message for record in caplog.records if "dropped" in record.message]
    assert len(told) == 1
    assert "epoch 1, batch 2" in told[0]
    assert "nan" in told[0]


def test_ten_in_a_row_are_skipped_and_eleven_raise() -> None:
    module, *_ = _fit(GradientClipping(0.5), Bad(set(range(1, 11))))
    assert all(p.isfinite().all() for p in module.parameters())
    with pytest.raises(RuntimeError, match=r"11 steps in a row .*epoch 2, batch 3 .* is nan.*'net.scale'"):
        _fit(GradientClipping(0.5), Bad(set(range(1, 12))))


def test_a_good_step_ends_the_row() -> None:
    clipping = GradientClipping(0.5, max_consecutive_skips=2)
    _fit(clipping, Bad({0, 1, 3, 4, 6, 7}))
    assert clipping.skipped == [6]


def test_none_in_a_row_may_be_forbidden() -> None:
    with pytest.raises(RuntimeError, match="1 steps in a row"):
        _fit(GradientClipping(0.5, max_consecutive_skips=0), Bad({1}))


def test_raises_with_the_parameters_name() -> None:
    with pytest.raises(RuntimeError, match=r"in epoch 0, batch 3 the norm of its gradients is inf.*\['net.scale'\]"):
        _fit(GradientClipping(0.5, nonfinite="raise"), Bad({3}, math.inf))


class Spikes(Bad):
    """Multiply gradients so that they are finite and far too large."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.seen in self.batches:
            for parameter in pl_module.parameters():
                parameter.grad.mul_(self.value)


@pytest.mark.parametrize(("spike", "skipped"), [(5.0, 2), (200.0, 0)])
def test_spikes_are_skipped_by_their_factor(spike: float, skipped: int) -> None:
    clipping, bad = GradientClipping(0.5, spike=spike), Spikes({14, 17}, 50.0)
    _fit(clipping, bad, max_epochs=5)
    assert clipping.skipped == [skipped]
    assert bad.unchanged == [skipped > 0] * 2


def test_the_first_steps_are_no_spikes() -> None:
    clipping = GradientClipping(0.5, spike=1.5)
    _fit(clipping, Spikes({5}, 50.0), max_epochs=2)
    assert clipping.skipped == [0]


def test_no_scale_cures_a_spike() -> None:
    """Consecutive spikes are counted under a GradScaler too, and end the run."""
    cell = Cell("automatic", "16-mixed", "single", "1")
    with pytest.raises(RuntimeError, match="2 steps in a row of SGD would be skipped"):
        _fit(GradientClipping(0.5, spike=5.0, max_consecutive_skips=1), Spikes({14, 15}, 50.0), cell, max_epochs=5)


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "ignore"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_scalers_own_skip_is_counted_once_and_is_no_error(nonfinite: Any, value: float) -> None:
    cell = Cell("automatic", "16-mixed", "single", "1")
    clipping, bad = GradientClipping(0.5, nonfinite=nonfinite, max_consecutive_skips=2), Bad({1, 5, 6, 7, 8}, value)
    module, _, trainer = _fit(clipping, bad, cell)
    assert clipping.skipped == [5]
    assert clipping.steps == [7]
    assert bad.unchanged == [True] * 5
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**10 / 2**5
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_gradients_that_stay_nonfinite_at_a_small_loss_scale_raise(nonfinite: Any) -> None:
    cell = Cell("automatic", "16-mixed", "single", "1")
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    clipping = GradientClipping(0.5, nonfinite=nonfinite, max_consecutive_skips=2)
    with pytest.raises(RuntimeError, match="epoch 0, batch 2" if nonfinite == "raise" else "3 steps in a row"):
        _fit(clipping, Bad(set(range(12))), cell, plugins=[plugin])


def test_a_skipped_window_is_one_step() -> None:
    clipping = GradientClipping(0.5)
    module, *_ = _fit(clipping, Bad({1}), Cell("automatic", "32-true", "single", "4short"))
    assert clipping.skipped == [1]
    assert clipping.skipped_at == [[0, 0, 3]]
    assert clipping.steps == [5]
    assert all(p.isfinite().all() for p in module.parameters())


def test_counts_and_medians_are_in_the_state() -> None:
    clipping = GradientClipping(AutoClip(50.0), spike=5.0)
    _fit(clipping, Bad({10, 11}))
    other = GradientClipping(AutoClip(50.0), spike=5.0)
    other.load_state_dict(clipping.state_dict())
    assert other.skipped == [2]
    assert other.skipped_at == clipping.skipped_at
    assert other._skipped_in_a_row == [2]
    assert torch.equal(other._checks[0]._norms.rows, clipping._checks[0]._norms.rows)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"policy": 0.0}, "`policy=0.0` must be a number > 0, a clipping policy or a list of them"),
        ({"policy": []}, "`policy=.*` must be a number > 0, a clipping policy or a list of them"),
        ({"policy": 1.0, "nonfinite": "drop"}, "`nonfinite` must be one of 'skip', 'raise', 'ignore', got 'drop'"),
        ({"policy": 1.0, "max_consecutive_skips": -1}, "`max_consecutive_skips` must be an integer >= 0, got -1"),
        ({"policy": 1.0, "spike": 1.0}, "`spike` must be a number > 1.0, got 1.0"),
    ],
)
def test_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GradientClipping(**arguments)
