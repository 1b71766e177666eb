"""Tests of OptimizerStep: what callbacks read of a step while a user's callback changes gradients before or after."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

from lightning_optim import (
    AGC,
    L2,
    AutoClip,
    Centralize,
    ClipByNorm,
    GradientClipping,
    GradientMonitor,
    Linear,
    OptimCallback,
    OptimizerStep,
    WeightRegularization,
    drop_step,
    gradients_of,
)
from lightning_optim.base import norms
from lightning_optim.runtime.session import Session
from tests.gradients.test_gradient_clipping import Bad
from tests.gradients.test_sparse_gradients import Words
from tests.gradients.test_sparse_gradients import fit as fit_words
from tests.harness import models, regression, run
from tests.harness.cells import MOMENTUM, Cell
from tests.harness.operators import Operators
from tests.harness.process_group import Group
from tests.lightning import Callback, LightningModule, Trainer

CELL = Cell("automatic", "32-true", "single", "1")
STRENGTH, MAX_NORM = 0.1, 0.5


def _parameters(*grads: list[float] | None) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.ones(2)) for _ in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else torch.tensor(grad)
    return parameters


def test_gradients_of_an_optimizer() -> None:
    """Parameters without a gradient are left out; the order is that of the groups."""
    first, silent, second = _parameters([1.0, 2.0], None, [3.0, 4.0])
    weights, grads = gradients_of(SGD([{"params": [second]}, {"params": [silent, first]}], 0.1))
    assert [id(weight) for weight in weights] == [id(second), id(first)]
    assert [grad.tolist() for grad in grads] == [[3.0, 4.0], [1.0, 2.0]]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets one entry each time that norms are computed."""
    calls: list[int] = []
    tensor_norms = norms.tensor_norms
    monkeypatch.setattr(norms, "tensor_norms", lambda *args: calls.append(1) or tensor_norms(*args))
    return calls


# ---- in a hand-written loop ------------------------------------------------------------------------------------------


def test_reads_the_groups_of_the_optimizer() -> None:
    first, silent, second = _parameters([1.0, 2.0], None, [3.0, 4.0])
    optimizer = SGD([{"params": [second], "lr": 0.5}, {"params": [silent, first]}], lr=0.1)
    step = OptimizerStep(optimizer, index=1, number=3, total=7, module=nn.ParameterList([first]))
    assert [id(p) for p in step.parameters] == [id(second), id(silent), id(first)]
    assert [[id(p) for p in group] for group in step.groups] == [[id(second)], [id(silent), id(first)]]
    assert [id(p) for p in step.weights] == [id(second), id(first)]
    assert [grad.tolist() for grad in step.grads] == [[3.0, 4.0], [1.0, 2.0]]
    assert step.parameter_names[1:] == ["optimizers.1.param_groups.1.params.0", "0"]
    assert step.names == ["optimizers.1.param_groups.0.params.0", "0"]
    assert step.lr == [0.5, 0.1]
    assert step.value_of(Linear(1.0, 0.0)) == 0.5
    assert step.value_of(7.0) == 7.0
    assert not step.dropped
    optimizer.zero_grad()
    step.refresh()
    assert step.dropped
    assert (step.weights, step.grads, step.names, float(step.norm())) == ([], [], [], 0.0)


def test_a_norm_is_computed_once(computed: list[int]) -> None:
    step = OptimizerStep(SGD(_parameters([3.0, 0.0], [0.0, 4.0]), lr=0.1))
    assert step.known_norm() is None
    for _ in range(3):
        step.refresh()
        assert float(step.norm()) == 5.0
        assert float(step.norm(math.inf)) == 4.0
        assert step.known_norm(1.0) is None
    assert len(computed) == 2


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "scaled in place": lambda p: p.grad.mul_(3.0),
    "replaced": lambda p: setattr(p, "grad", p.grad * 3.0),
    "one element": lambda p: p.grad[0].fill_(9.0),
    "dropped": lambda p: setattr(p, "grad", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_norm_is_forgotten_when_a_gradient_changes(change: str) -> None:
    first, second = _parameters([3.0, 0.0], [0.0, 4.0])
    step = OptimizerStep(SGD([first, second], lr=0.1))
    step.norm()
    with torch.no_grad():
        CHANGES[change](first)
    step.refresh()
    assert step.known_norm() is None
    assert float(step.norm()) == pytest.approx(4.0 if change == "dropped" else math.hypot(9.0, 4.0))


def test_a_gradient_that_is_replaced_again_and_again_is_never_taken_for_the_first() -> None:
    """Python gives a new tensor the identity of one that was freed."""
    (parameter,) = _parameters([1.0, 0.0])
    step = OptimizerStep(SGD([parameter], lr=0.1))
    for factor in range(2, 30):
        step.refresh()
        before = float(step.norm())
        parameter.grad = None
        parameter.grad = torch.tensor([float(factor), 0.0])
        step.refresh()
        assert (before, float(step.norm())) == (factor - 1.0, factor)


def test_a_new_parameter_group_is_seen() -> None:
    first, second = _parameters([3.0, 0.0], [0.0, 4.0])
    optimizer = SGD([first], lr=0.1)
    step = OptimizerStep(optimizer)
    assert float(step.norm()) == 3.0
    optimizer.add_param_group({"params": [second], "lr": 0.7})
    step.refresh()
    assert float(step.norm()) == 5.0
    assert step.lr == [0.1, 0.7]
    assert len(step.names) == 2


def test_a_gradient_that_was_replaced_is_not_kept_alive() -> None:
    (parameter,) = _parameters([3.0, 4.0])
    step = OptimizerStep(SGD([parameter], lr=0.1))
    step.norm()
    held = weakref.ref(parameter.grad.untyped_storage())  # type: ignore[union-attr]
    parameter.grad = torch.tensor([1.0, 0.0])
    step.refresh()
    assert step.grads[0] is parameter.grad
    gc.collect()
    assert held() is None


def test_writes_to_the_rows_of_a_sparse_gradient_are_seen() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    step = OptimizerStep(SGD(embedding.parameters(), lr=0.1))
    assert float(step.norm()) == pytest.approx(math.sqrt(10.0))  # the rows [2, 2] and [1, 1]
    step.grads[0].values().mul_(2.0)
    step.refresh()
    assert float(step.norm()) == pytest.approx(2.0 * math.sqrt(10.0))


@pytest.mark.parametrize("make", [lambda: ClipByNorm(1.0), lambda: AGC(0.01), lambda: AutoClip(), lambda: Centralize()])
def test_made_of_views(make: Callable[[], Any]) -> None:
    """Clip the rows of one stacked member as if it were alone, in the stacked gradient itself."""
    members, shapes = 3, [(8, 4), (8,), (2, 8)]
    stacked = [nn.Parameter(torch.randn(members, *shape)) for shape in shapes]
    for parameter in stacked:
        parameter.grad = 5.0 * torch.randn_like(parameter)
    optimizer = SGD(stacked, lr=0.1)
    for member in range(members):
        alone = [nn.Parameter(parameter[member].detach().clone()) for parameter in stacked]
        for own, parameter in zip(alone, stacked, strict=True):
            own.grad = parameter.grad[member].clone()  # type: ignore[index]
        step = OptimizerStep(
            optimizer,
            weights=lambda member=member: [parameter.detach()[member] for parameter in stacked],  # type: ignore[misc]
            grads=lambda member=member: [parameter.grad[member] for parameter in stacked],  # type: ignore[misc]
        )
        wanted = OptimizerStep(SGD(alone, lr=0.1))
        assert float(step.norm()) == pytest.approx(float(wanted.norm()))
        for one in (step, wanted):
            make().clip_(one.grads, one.weights)
        for parameter, own in zip(stacked, alone, strict=True):
            assert torch.allclose(parameter.grad[member], own.grad)  # type: ignore[index, arg-type]
        assert len(step.names) == len(shapes)


# ---- a user's callback before, between and after ours ----------------------------------------------------------------


def _scale(optimizer: Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter.grad is not None:
            parameter.grad.mul_(2.0)


def _replace(optimizer: Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter.grad is not None:
            parameter.grad = parameter.grad + 0.1


def _remove(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].grad = None


def _add_group(optimizer: Optimizer) -> None:
    new = nn.Parameter(torch.ones(3, 3))
    new.grad = torch.full((3, 3), 0.2)
    optimizer.add_param_group({"params": [new], "lr": 0.01})


class Meddling(Callback):
    """Change the gradients of the second step and of those after it; add a parameter group once."""

    def __init__(self, change: Callable[[Optimizer], None]) -> None:
        self.change, self.calls = change, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.calls += 1
        if self.calls == 2 or (self.calls > 2 and self.change is not _add_group):
            self.change(optimizer)


def _by_hand(change: Callable[[Optimizer], None], place: int) -> tuple[list[Tensor], list[float], list[float]]:
    """Train with torch alone; return weights, measured norms, and norms of the gradients that the optimizer used."""
    nets = regression.nets_of(regression.build_nets(1))
    weights = list(nets[0].parameters())
    optimizer = SGD(weights, lr=CELL.lr, momentum=MOMENTUM)
    meddling, measured, used = Meddling(change), [], []
    for batch in regression.make_batches(CELL.batches, seed=10) * 2:
        optimizer.zero_grad()
        regression.loss_of(0, nets, batch).backward()
        for slot in range(3):
            if slot == place:
                meddling.on_before_optimizer_step(None, None, optimizer)  # type: ignore[arg-type]
            if slot == 0:
                for weight in weights:
                    if weight.ndim >= 2:
                        penalty = 2.0 * STRENGTH * weight.detach()
                        weight.grad = penalty if weight.grad is None else weight.grad + penalty
                measured.append(_norm(optimizer))
            elif slot == 1:
                clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], MAX_NORM)
        used.append(_norm(optimizer))
        optimizer.step()
    return [weight.detach() for weight in weights], measured, used


def _norm(optimizer: Optimizer) -> float:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


@pytest.mark.parametrize("place", [0, 1, 2], ids=["before", "between", "after"])
@pytest.mark.parametrize("change", [_scale, _replace, _remove, _add_group])
@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
def test_a_users_callback_among_ours(change: Callable[[Optimizer], None], place: int, nonfinite: Any) -> None:
    monitor, recorder = GradientMonitor("parameter"), run.Recorder()
    callbacks: list[Callback] = [
        WeightRegularization(L2(STRENGTH)),
        monitor,
        GradientClipping(MAX_NORM, nonfinite=nonfinite),
    ]
    callbacks.insert([0, 2, 3][place], Meddling(change))
    module = models.build(CELL)
    run.make_trainer(CELL, callbacks, logger=recorder, max_epochs=2, log_every_n_steps=1).fit(module)
    weights, measured, used = _by_hand(change, place)
    for ours, wanted in zip(module.parameters(), weights, strict=True):
        assert torch.allclose(ours, wanted, atol=1e-6)
    assert list(recorder.logged["gradients/norm"].values()) == pytest.approx(measured, rel=1e-5)
    assert list(recorder.logged["gradients/norm_clipped"].values()) == pytest.approx(used, rel=1e-5)
    untouched, *_ = _by_hand(lambda optimizer: None, place)
    if (change, place) not in ((_scale, 1), (_add_group, 2)):  # of which these weights must see nothing
        assert max(float((a - b).abs().max()) for a, b in zip(weights, untouched, strict=True)) > 1e-5


@pytest.mark.parametrize("place", [0, 1, 2], ids=["before", "between", "after"])
def test_a_step_that_a_user_drops(place: int) -> None:
    """Check that later callbacks have nothing to act on, and that the step is not counted."""

    class Dropping(OptimCallback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx == 1:
                drop_step(trainer, optimizer, "a test")
                assert self.current_step(optimizer).dropped
                assert not self.current_step(optimizer).grads

    seeing, monitor = Seeing(), GradientMonitor()
    callbacks: list[Callback] = [WeightRegularization(L2(STRENGTH)), monitor, GradientClipping(MAX_NORM)]
    callbacks.insert([0, 2, 3][place], Dropping())
    run.make_trainer(CELL, [*callbacks, seeing], max_epochs=2).fit(models.build(CELL))
    assert monitor.steps == [6]
    assert monitor.skipped == [2 if place else 0]
    assert [step.number for step in seeing.after] == list(range(6))


# ---- in a fit --------------------------------------------------------------------------------------------------------


class Seeing(OptimCallback):
    """Keep the steps that it was given, and their values."""

    def reset(self) -> None:
        self.before: list[OptimizerStep] = []
        self.after: list[OptimizerStep] = []
        self.said: list[tuple[int, int, float, list[str], list[float], bool]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        step = self.current_step(optimizer)
        if step.dropped:
            return
        ours = [p for group in optimizer.param_groups for p in group["params"]]
        assert [id(grad) for grad in step.grads] == [id(p.grad) for p in ours]
        self.before.append(step)
        self.said.append((step.index, step.number, step.total, step.names, step.lr, step.logs))

    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.after.append(self.current_step(optimizer))
        assert self.after[-1].number == self.steps[self.after[-1].index] - 1


class Left(Callback):
    """Count the steps that the session still holds at the end of a batch."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        session = Session.find(trainer)
        assert session is not None
        self.left.append(len(session._steps))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("kind", ["automatic", "manual", "two"])
def test_all_callbacks_see_one_step(kind: Any, precision: Any) -> None:
    """Compare number, total, names and learning rates, with two optimizers and manual optimization too."""
    cell, first, second, left = Cell(kind, precision, "single", "1"), Seeing(name="a"), Seeing(name="b"), Left()
    trainer = run.make_trainer(cell, [first, second, left], max_epochs=2, log_every_n_steps=3)
    module = models.build(cell)
    trainer.fit(module)
    count = first.steps[0]
    assert first.said == second.said
    assert all(a is b for a, b in zip(first.before, second.before, strict=True))
    assert all(a is b for a, b in zip(first.before, first.after, strict=True))
    assert len(set(map(id, first.before))) == len(first.before) == count * cell.optimizers
    for index, net in enumerate(module.nets):
        told = [said for said in first.said if said[0] == index]
        names = {id(p): name for name, p in module.named_parameters()}
        assert [number for _, number, *_ in told] == list(range(count))
        assert {total for _, _, total, *_ in told} == {count}
        assert all(said[3] == [names[id(p)] for p in net.parameters()] for said in told)
        assert all(said[4] == [cell.lr] for said in told)
        assert [said[5] for said in told] == [(batch + 1) % 3 == 0 for batch in range(count)]
    assert set(left.left) == {0}


def test_a_step_that_the_scaler_skips_leaves_nothing() -> None:
    cell, seeing, left = Cell("automatic", "16-mixed", "single", "1"), Seeing(), Left()
    run.make_trainer(cell, [seeing, GradientClipping(1.0, nonfinite="ignore"), Bad({1}), left]).fit(models.build(cell))
    assert len(seeing.before) == len(seeing.after) + 1
    assert [step.number for step in seeing.before[:3]] == [0, 1, 1]
    assert set(left.left) == {0}


def test_a_step_that_raises_leaves_nothing() -> None:
    class Failing(Seeing):
        def on_after_optimizer_step(self, *_: Any) -> None:
            raise ZeroDivisionError

    failing = Failing()
    trainer = run.make_trainer(CELL, [failing])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(models.build(CELL))
    assert failing.fit is None


def test_a_callback_that_steps_again_after_a_step() -> None:
    """Both steps are counted, by all callbacks."""

    class Again(Seeing):
        again = False

        def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            self.again = not self.again
            if self.again:
                optimizer.step()

    again, left = Again(), Left()
    run.make_trainer(CELL, [again, counting := OptimCallback(), left]).fit(models.build(CELL))
    assert again.steps == counting.steps == [2 * len(again.before)]
    assert set(left.left) == {0}


def test_outside_of_a_fit_there_is_no_step() -> None:
    with pytest.raises(RuntimeError, match="in no fit"):
        OptimCallback().current_step(SGD(_parameters([1.0, 2.0]), lr=0.1))


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_validation_end"]
)
def test_a_step_asked_for_between_two_steps_changes_nothing(hook: str) -> None:
    """It is the next one, and each later step has its own number and `logs`."""

    class Asking(OptimCallback):
        def __init__(self) -> None:
            super().__init__()
            self.numbers: list[bool] = []

    def ask(self: Asking, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            step = self.current_step(trainer.optimizers[0])
            self.numbers.append(step.number == self.steps[0] and step.norm() is not None)

    setattr(Asking, hook, ask)
    cell = Cell("automatic", "32-true", "single", "4")
    plain, seeing, asking, left = Seeing(), Seeing(), Asking(), Left()
    for callbacks in ([plain], [seeing, asking, left]):
        run.make_trainer(cell, callbacks, max_epochs=2, log_every_n_steps=3).fit(models.build(cell))
    assert seeing.said == plain.said
    assert {said[5] for said in plain.said} == {True, False}
    assert asking.numbers and all(asking.numbers)
    assert set(left.left) == {0}


@pytest.mark.parametrize("hook", ["on_fit_start", "on_sanity_check_start"])
def test_before_training_there_is_no_step(hook: str) -> None:
    class Early(OptimCallback):
        pass

    setattr(Early, hook, lambda self, trainer, *_: self.current_step(trainer.optimizers[0]))
    with pytest.raises(RuntimeError, match="no step before `on_train_start`"):
        run.make_trainer(CELL, [Early()], num_sanity_val_steps=1).fit(models.build(CELL))


def test_a_foreign_optimizer_has_no_step() -> None:
    class Foreign(OptimCallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.current_step(SGD(_parameters([1.0, 2.0]), lr=0.1))

    with pytest.raises(RuntimeError, match=r"no step of SGD: it is not in `trainer.optimizers`"):
        run.make_trainer(CELL, [Foreign()]).fit(models.build(CELL))


def test_a_wrapped_optimizer_is_the_same() -> None:
    class Wrapped(OptimCallback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            assert self.current_step(pl_module.optimizers()) is self.current_step(optimizer)  # type: ignore[arg-type]
            self.asked = True

    wrapped = Wrapped()
    run.make_trainer(CELL, [wrapped]).fit(models.build(CELL))
    assert wrapped.asked


def test_of_sparse_gradients() -> None:
    class Rows(OptimCallback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            step = self.current_step(optimizer)
            assert all(grad.is_coalesced() for grad in step.grads if grad.is_sparse)
            dense = [grad.to_dense() if grad.is_sparse else grad for grad in step.grads]
            assert float(step.norm()) == pytest.approx(float(torch.cat([g.flatten() for g in dense]).norm()))
            self.sparse = [name for name, grad in zip(step.names, step.grads, strict=True) if grad.is_sparse]

    rows = Rows()
    fit_words(Words(), rows)
    assert rows.sparse == ["embed.weight", "bag.weight"]


# ---- over ranks ------------------------------------------------------------------------------------------------------


class Norms(OptimCallback):
    """Keep the norms of a step before and after writes in place to the whole gradient."""

    def reset(self) -> None:
        self.norms: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        found = []
        for factor in (1.0, 2.0, 0.5):
            for grad in self.current_step(optimizer).grads:
                grad.mul_(factor)
            step = self.current_step(optimizer)
            found += [float(step.norm()), float(step.norm()), float(step.norm(math.inf))]
        self.norms.append(found)


def _norms(strategy: Any) -> list[list[float]]:
    cell, seen = Cell("automatic", "32-true", strategy, "1"), Norms()
    run.make_trainer(cell, [GradientMonitor(), seen, GradientClipping(MAX_NORM)]).fit(models.build(cell))
    return seen.norms


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_norms_on_two_ranks_are_those_of_one(strategy: str, group: Group) -> None:
    wanted = _norms("single")
    for found in group.run(_norms, strategy):
        for one, other in zip(found, wanted, strict=True):
            assert one == pytest.approx(other, rel=1e-4)


# ---- what it costs ---------------------------------------------------------------------------------------------------


def _operations(log_every: int, max_norm: float, nonfinite: Any) -> int:
    operators, counts = Operators(on=False), []

    class Around(OptimCallback):
        def __init__(self, inside: bool) -> None:
            super().__init__(name=str(inside))
            self.inside = inside

        def on_before_optimizer_step(self, *_: Any) -> None:
            operators.on = self.inside

        def on_after_optimizer_step(self, *_: Any) -> None:
            operators.on = self.inside
            if not self.inside:
                counts.append(operators.count)

    ours = [WeightRegularization(L2(STRENGTH)), GradientMonitor(), GradientClipping(max_norm, nonfinite)]
    trainer = run.make_trainer(CELL, [Around(True), *ours, Around(False)], log_every_n_steps=log_every)
    with operators:
        trainer.fit(models.build(CELL))
    assert counts[-1] - counts[-2] == counts[-2] - counts[-3]
    return counts[-1] - counts[-2]


@pytest.mark.parametrize(
    ("log_every", "nonfinite", "max_norm", "operations"),
    [(1000, "skip", 0.5, 21), (1000, "skip", 1e9, 10), (1000, "ignore", 0.5, 20), (1, "skip", 0.5, 72)],
)
def test_number_of_operations_of_penalty_monitor_and_clipping(
    log_every: int, nonfinite: Any, max_norm: float, operations: int
) -> None:
    """Compare with the first version, where each callback read the gradients by itself."""
    assert 0 < _operations(log_every, max_norm, nonfinite) <= operations
