"""GradientMonitor: its levels, the norm that it shares with clipping, and its history."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest
import torch
from lightning_utilities.core import rank_zero
from matplotlib import colors, pyplot

from lightning_optim import (
    AGC,
    AutoClip,
    Centralize,
    ClipByNorm,
    ClipByValue,
    GradientClipping,
    GradientMonitor,
    Linear,
    ZClip,
    drop_step,
)
from lightning_optim.base import norms
from lightning_optim.base.norms import total_norm
from lightning_optim.gradients.gradient_monitor import _ordinal
from tests.gradients.test_gradient_clipping import CELL, Bad
from tests.harness import models, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.lightning import Callback, LightningModule, Trainer

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


def _fit(monitor: GradientMonitor, *others: Callback, cell: Cell = CELL, **changes: Any) -> dict[str, dict[int, float]]:
    recorder = run.Recorder()
    arguments = {"logger": recorder, "max_epochs": 3} | changes
    run.make_trainer(cell, [*others, monitor], **arguments).fit(models.build(cell))
    return recorder.logged


class Norms(Callback):
    """Store the norms of all gradients, in a user's callback that runs before ours."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        squares = [p.grad.double().square().sum() for p in pl_module.parameters()]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


def test_every_step_is_remembered_though_few_are_logged() -> None:
    monitor, norms = GradientMonitor(), Norms()
    logged = _fit(monitor, norms, log_every_n_steps=5)
    assert list(logged["gradients/norm"]) == [4, 9]
    for percentile in (0.0, 50.0, 90.0, 100.0):
        wanted = torch.quantile(torch.tensor(norms.norms), percentile / 100.0).item()
        assert monitor.suggest_clip(percentile) == pytest.approx(wanted, rel=1e-5)
    assert len(norms.norms) == 12


def test_the_threshold_clips_the_share_that_was_asked_for() -> None:
    first = GradientMonitor()
    _fit(first)
    second = GradientMonitor()
    logged = _fit(second, GradientClipping(first.suggest_clip(75.0)))
    assert 0.0 < list(logged["gradients/share_clipped"].values())[-1] < 0.6


@pytest.mark.parametrize("level", ["module", "parameter"])
def test_parts_add_up_to_the_total(level: Any) -> None:
    logged = _fit(GradientMonitor(level), GradientClipping(0.5))
    for what in ("norm", "norm_clipped"):
        parts = [name for name in logged if name.startswith(f"gradients/{what}/")]
        assert len(parts) == {"module": 3, "parameter": 5}[level]
        for position, total in logged[f"gradients/{what}"].items():
            together = math.sqrt(sum(logged[name][position] ** 2 for name in parts))
            assert together == pytest.approx(total, rel=1e-5)
    assert f"gradients/update_ratio/{'net.inner' if level == 'module' else 'net.inner.bias'}" in logged


def test_the_update_is_that_of_the_formula_for_sgd_without_momentum() -> None:
    class Plain(models.Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02)

        def on_train_batch_start(self, *_: Any) -> None:
            self.size = float(total_norm([p.detach() for p in self.parameters()]))

    recorder, module = run.Recorder(), Plain(CELL)
    run.make_trainer(CELL, [GradientMonitor()], logger=recorder, max_epochs=1).fit(module)
    last = max(recorder.logged["gradients/norm"])
    wanted = 0.02 * recorder.logged["gradients/norm"][last] / module.size
    assert recorder.logged["gradients/update_ratio"][last] == pytest.approx(wanted, rel=1e-4)


def test_the_norm_is_that_of_the_clipping() -> None:
    logged = _fit(GradientMonitor(), GradientClipping(ClipByNorm(0.2, norm_type=math.inf)))
    assert list(logged["gradients/norm_clipped"].values()) == pytest.approx([0.2] * 12, rel=1e-4)


@pytest.mark.parametrize(
    ("policy", "share"),
    [
        (ClipByNorm(1e-3), 1.0),
        (ClipByNorm(1e3), 0.0),
        (AGC(1e-3), 1.0),
        (ClipByValue(1e-3), 1.0),
        (ClipByValue(1e3), 0.0),
        ([Centralize(), ClipByNorm(1e3)], 0.0),
    ],
    ids=repr,
)
def test_share_of_steps_clipped(policy: Any, share: float) -> None:
    logged = _fit(GradientMonitor(), GradientClipping(policy))
    assert set(logged["gradients/share_clipped"].values()) == {share}


@pytest.mark.parametrize("policy", [Centralize(), [Centralize(), ClipByValue(1.0)]], ids=repr)
def test_a_share_that_nobody_knows_is_not_logged(policy: Any) -> None:
    logged = _fit(GradientMonitor(), GradientClipping(policy))
    assert "gradients/share_clipped" not in logged
    assert "gradients/norm_clipped" in logged


class Dropping(Callback):
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 2:
            drop_step(trainer, optimizer, "a test")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_skipped_steps_are_counted_and_not_remembered(precision: Any) -> None:
    monitor = GradientMonitor()
    logged = _fit(monitor, GradientClipping(0.5), Bad({2, 5}), cell=Cell("automatic", precision, "single", "1"))
    assert monitor.skipped == [2]
    assert len(monitor._rows(0)) == 10
    assert list(logged["gradients/skipped"].values())[-1] == 2.0
    assert math.isfinite(monitor.suggest_clip(100.0))


def test_a_step_that_another_callback_drops_is_counted() -> None:
    # It stands behind the monitor in the list, and ours keep their places among themselves only.
    monitor = GradientMonitor()
    run.make_trainer(CELL, [monitor, Dropping()], max_epochs=2).fit(models.build(CELL))
    assert monitor.skipped == [2]
    assert monitor.steps == [6]


class Doubling(Callback):
    """Change gradients between measuring and clipping, as a user's callback may."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.mul_(2.0)


def _norms_computed(monkeypatch: pytest.MonkeyPatch, *callbacks: Callback) -> tuple[int, dict[str, Any]]:
    calls: list[int] = []
    tensor_norms = norms.tensor_norms
    monkeypatch.setattr(norms, "tensor_norms", lambda *args: calls.append(1) or tensor_norms(*args))
    recorder = run.Recorder()
    run.make_trainer(CELL, callbacks, logger=recorder, max_epochs=2, log_every_n_steps=1000).fit(models.build(CELL))
    return len(calls), recorder.logged


def test_one_norm_is_computed_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _norms_computed(monkeypatch, GradientClipping(0.5), GradientMonitor())[0] == 8


def test_a_norm_that_is_stale_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clipping = GradientClipping(ClipByNorm(0.5))
    assert _norms_computed(monkeypatch, GradientMonitor(), Doubling(), clipping)[0] == 16


class Clipped(Callback):
    """Store the norm of the gradients that the optimizer uses."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.norm = float(total_norm([p.grad for p in pl_module.parameters()]))


def test_clipping_is_right_when_a_callback_between_changes_the_gradients() -> None:
    last = Clipped()
    run.make_trainer(CELL, [GradientMonitor(), Doubling(), GradientClipping(0.5), last]).fit(models.build(CELL))
    assert last.norm == pytest.approx(0.5, rel=1e-4)


def _ranks(strategy: str) -> Any:
    recorder = run.Recorder()
    cell = Cell("automatic", "32-true", strategy, "1")  # type: ignore[arg-type]
    monitor = GradientMonitor("parameter")
    run.make_trainer(cell, [monitor], logger=recorder, max_epochs=3).fit(models.build(cell))
    return recorder.logged, monitor.suggest_clip(60.0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_by_parameter_on_two_ranks_as_on_one(strategy: str, group: Group) -> None:
    monitor = GradientMonitor("parameter")
    wanted = _fit(monitor)
    for logged, suggestion in group.run(_ranks, strategy):
        assert suggestion == pytest.approx(monitor.suggest_clip(60.0), rel=1e-5)
        for name in wanted:
            if name.startswith("gradients/"):
                assert logged[name] == pytest.approx(wanted[name], rel=1e-4), name


def test_its_memory_is_in_the_state() -> None:
    monitor, other = GradientMonitor(history=5), GradientMonitor(history=5)
    _fit(monitor, Bad({3}), GradientClipping(0.5))
    other.load_state_dict(monitor.state_dict())
    assert other.suggest_clip(30.0) == monitor.suggest_clip(30.0)
    assert other.skipped == [1]
    assert len(other._rows(0)) == 5


def test_nothing_to_suggest_before_a_step() -> None:
    with pytest.raises(RuntimeError, match="train some steps first"):
        GradientMonitor().suggest_clip()
    with pytest.raises(ValueError, match=r"`percentile` must be a number in .0.0, 100.0., got 101"):
        GradientMonitor().suggest_clip(101)


@pytest.mark.parametrize("arguments", [{"level": "layer"}, {"history": 0}])
def test_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`?"):
        GradientMonitor(**arguments)


@pytest.mark.parametrize("clips", [False, True])
def test_plot_shows_the_norms(clips: bool) -> None:
    import matplotlib.pyplot as plt

    monitor = GradientMonitor()
    _fit(monitor, *([GradientClipping(0.5)] if clips else []), log_every_n_steps=4)
    figure, axes = monitor.plot()
    before = axes.lines[0].get_ydata()
    assert list(axes.lines[0].get_xdata()) == list(range(1, 13))
    assert max(before) == pytest.approx(monitor.suggest_clip(100.0))
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert len(dots) == clips
    if clips:
        assert list(dots[0].get_xdata()) == [4, 8, 12]
    assert monitor.plot(0, ax=axes) == (figure, axes)
    with pytest.raises(ValueError, match=r"the index of an optimizer, 0 \(SGD\), got 'val_loss': .* no metric"):
        monitor.plot("val_loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`metric_or_optimizer` must be the index of an optimizer, 0 \(SGD\), got 1"):
        monitor.plot(1)
    plt.close(figure)


# ---- the bound in force, and the optimizer that a plot or a suggestion is about --------------------------------------

TWO = Cell("two", "32-true", "single", "1")


def _bound(axes: Any) -> dict[int, float]:
    """Return the bound that a plot shows, by step; steps without one are left out."""
    (line,) = [line for line in axes.lines if "bound in force" in str(line.get_label())]
    pairs = zip(line.get_xdata(), line.get_ydata(), strict=True)
    return {int(step): float(bound) for step, bound in pairs if math.isfinite(bound)}


def _norms(axes: Any) -> list[float]:
    return [float(norm) for norm in axes.lines[0].get_ydata()]


@pytest.mark.parametrize(
    ("policy", "bound"),
    [
        (0.5, 0.5),
        (500.0, 500.0),  # nothing is clipped
        ([ClipByValue(1e3), ClipByNorm(0.5)], 0.5),
        ([ClipByNorm(0.5), ClipByNorm(0.7)], 0.5),
        ({"*": 0.5}, 0.5),
        ({0: 0.5}, 0.5),
    ],
    ids=repr,
)
def test_the_plot_shows_a_fixed_bound(policy: Any, bound: float) -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(policy))
    _, axes = monitor.plot()
    assert _bound(axes) == pytest.approx(dict.fromkeys(range(1, 13), bound))
    assert any(f"bound in force, {bound:g}" in str(line.get_label()) for line in axes.lines)


def test_the_plot_shows_the_bound_of_a_schedule_at_each_step() -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(ClipByNorm(Linear(1.2, 0.1))), log_every_n_steps=4)
    _, axes = monitor.plot()
    assert _bound(axes) == pytest.approx({step: 1.2 - 0.1 * (step - 1) for step in range(1, 13)}, rel=1e-5)


def test_the_plot_shows_the_bound_of_a_percentile_at_each_step() -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(AutoClip(50.0)), log_every_n_steps=4)
    _, axes = monitor.plot()
    norms = torch.tensor(_norms(axes))
    assert _bound(axes) == pytest.approx({n: float(norms[:n].quantile(0.5)) for n in range(1, 13)}, rel=1e-5)


def test_the_plot_shows_the_norm_above_which_a_score_is_clipped() -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(ZClip(z=1.5, warmup=4)))
    _, axes = monitor.plot()
    bound, norms = _bound(axes), dict(enumerate(_norms(axes), start=1))
    assert min(bound) == 5, "none in the warm-up"
    first = torch.tensor(_norms(axes)[:4])
    assert bound[5] == pytest.approx(float(first.mean() + 1.5 * first.std(correction=0)), rel=1e-4)
    clipped = monitor._rows(0)[:, 3]
    assert [bool(flag) for flag in clipped] == [norms[n] > bound.get(n, math.inf) for n in norms]


def test_of_several_bounds_the_smallest_is_in_force() -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping([AutoClip(50.0), ClipByNorm(Linear(1e3, 1e-3))]))
    _, axes = monitor.plot()
    bound = _bound(axes)
    assert bound[12] == pytest.approx(1e-3)
    assert bound[1] == pytest.approx(_norms(axes)[0])


@pytest.mark.parametrize(
    "policy",
    [ClipByValue(0.1), ClipByNorm(0.5, scope="tensor"), ClipByNorm(0.5, on="*.inner.*"), {"*.inner.*": 0.5, "*": 1}],
)
def test_no_bound_is_shown_where_none_is_on_the_whole_norm(policy: Any) -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(policy))
    _, axes = monitor.plot()
    assert not [line for line in axes.lines if "in force" in str(line.get_label())]


def test_a_step_that_is_not_logged_reads_nothing_for_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> float:
        raise AssertionError("the host waits for the device")

    class Refusing(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            for name in ("__float__", "item", "__bool__", "tolist"):
                monkeypatch.setattr(torch.Tensor, name, refuse)

        def on_train_batch_end(self, *_: Any) -> None:
            monkeypatch.undo()

    policies = [AutoClip(50.0), ZClip(), ClipByNorm(Linear(1.0, 0.5))]
    monitor = GradientMonitor()
    _fit(monitor, Refusing(), GradientClipping(policies, nonfinite="ignore"), log_every_n_steps=1000)
    assert len(monitor._rows(0)) == 12


def test_a_history_of_an_earlier_version_has_no_bound() -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(0.5))
    state = monitor.state_dict()
    state["recent"][0]["rows"] = state["recent"][0]["rows"][:, :4]
    del state["measured"]
    other = GradientMonitor()
    other.load_state_dict(state)
    _, axes = other.plot()
    assert not [line for line in axes.lines if "in force" in str(line.get_label())]
    assert axes.get_title() == "Gradient norms of optimizer 0: 100 % of 12 steps clipped"


def test_a_suggestion_says_of_which_optimizer_and_norm_it_is(caplog: pytest.LogCaptureFixture) -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping({1: ClipByNorm(0.5, norm_type=math.inf)}), cell=TWO)
    with pytest.raises(
        ValueError, match=r"several optimizers, 0 \(SGD\), 1 \(SGD\): name one.*`suggest_clip\(optimizer"
    ):
        monitor.suggest_clip()
    with pytest.raises(ValueError, match=r"`optimizer` must be the index of an optimizer, 0 \(SGD\), 1 \(SGD\), got 2"):
        monitor.suggest_clip(optimizer=2)
    with caplog.at_level("INFO", logger=rank_zero.log.name):
        bounds = [monitor.suggest_clip(50.0, optimizer) for optimizer in (0, 1)]
    assert [record.message for record in caplog.records if "percentile" in record.message] == [
        f"The 50th percentile of the last 12 gradient norms (2-norm) of optimizer 0 (SGD) is {bounds[0]:.4g}.",
        "The 50th percentile of the last 12 gradient norms (largest absolute value) of optimizer 1 (SGD) is"
        f" {bounds[1]:.4g}.",
    ]


def test_a_plot_of_several_optimizers_names_each_and_gives_it_one_colour() -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping({0: 0.5}), cell=TWO)
    _, axes = monitor.plot()
    assert axes.get_title() == "Gradient norms of 2 optimizers"
    labels = {str(line.get_label()): line.get_color() for line in axes.lines}
    assert [label.partition(", ")[2] for label in labels if label.startswith("optimizer 0 (SGD)")] == [
        "before clipping",
        "after clipping (100 % of 12 steps clipped)",
        "bound in force, 0.5",
    ]
    assert [label for label in labels if label.startswith("optimizer 1 (SGD)")] == ["optimizer 1 (SGD), each step"]
    assert len(set(labels.values())) == 2
    _, one = monitor.plot(1)
    assert one.get_title() == "Gradient norms of optimizer 1 (SGD): 12 steps"
    assert [str(line.get_label()).partition(",")[0] for line in one.lines] == [
        "each step",
        "suggested bound (90th percentile)",
    ]


class Overriding(models.Model):
    """Clip in a hook of its own, with a bound that no one else knows; infinite for a hook that does nothing."""

    bound = 0.2

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        if math.isfinite(self.bound):
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.bound)


def _by_lightning(model: type[models.Model] = models.Model, **changes: Any) -> tuple[GradientMonitor, dict[str, Any]]:
    monitor, recorder = GradientMonitor(), run.Recorder()
    arguments = {"logger": recorder, "max_epochs": 3} | changes
    run.make_trainer(CELL, [monitor], **arguments).fit(model(CELL))
    return monitor, recorder.logged


def test_the_clipping_of_the_trainer_is_shown_as_that_of_the_callback() -> None:
    ours = GradientMonitor()
    wanted = _fit(ours, GradientClipping(0.5), log_every_n_steps=4)
    monitor, logged = _by_lightning(gradient_clip_val=0.5, log_every_n_steps=4)
    for name in ("norm", "norm_clipped", "share_clipped"):
        assert logged[f"gradients/{name}"] == pytest.approx(wanted[f"gradients/{name}"], rel=1e-5)
    (_, axes), (_, expected) = monitor.plot(), ours.plot()
    assert [line.get_label() for line in axes.lines] == [line.get_label() for line in expected.lines]
    assert axes.get_title() == expected.get_title()
    assert _bound(axes) == dict.fromkeys(range(1, 13), 0.5)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (models.Model, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
        (Overriding, {}),
        (Overriding, {"gradient_clip_val": 7.0}),
    ],
)
def test_a_clipping_without_a_known_bound_is_seen_from_the_norms(model: Any, arguments: dict[str, Any]) -> None:
    monitor, logged = _by_lightning(model, **arguments)
    assert set(logged["gradients/share_clipped"].values()) == {1.0}
    _, axes = monitor.plot()
    labels = [str(line.get_label()).partition(" (")[0] for line in axes.lines]
    assert labels == ["before clipping", "after clipping", "suggested bound"]


def test_a_hook_for_clipping_that_does_nothing_does_not_clip() -> None:
    _, logged = _by_lightning(type("Idle", (Overriding,), {"bound": math.inf}))
    assert "gradients/share_clipped" not in logged


def test_the_report_is_of_the_history() -> None:
    assert not GradientMonitor().report()
    monitor, short = GradientMonitor(), GradientMonitor(history=5)
    _fit(monitor)
    median, high = monitor.suggest_clip(50.0), monitor.suggest_clip(90.0)
    assert monitor.report() == f"gradient norm: median {median:.3g}, 90th percentile {high:.3g}"
    _fit(short)
    assert short.report().startswith("gradient norm in the last 5 steps: median ")
    two = GradientMonitor()
    _fit(two, cell=TWO)
    first, second = two.report().split("; ")
    assert first.startswith("gradient norm of optimizer 0: median ") and second.startswith("of optimizer 1: median ")


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_all_that_is_drawn_can_be_seen(style: str) -> None:
    monitor = GradientMonitor()
    _fit(monitor, GradientClipping(ClipByNorm(Linear(1.2, 0.1))))
    with pyplot.style.context(style):
        figure, axes = monitor.plot()
        background = colors.to_rgb(figure.get_facecolor())
        for line in axes.lines:
            seen = zip(colors.to_rgb(line.get_color()), background, strict=True)
            assert max(abs(a - b) for a, b in seen) > 0.4
        assert axes.get_xlabel() == "optimizer steps"
        assert axes.get_ylabel() == "norm of the gradients (2-norm)"
        assert axes.get_title() == f"Gradient norms of optimizer 0 (SGD): {_share(monitor)} % of 12 steps clipped"


def _share(monitor: GradientMonitor) -> str:
    return f"{100.0 * float(monitor._rows(0)[:, 3].mean()):.0f}"


@pytest.mark.parametrize(
    ("number", "wanted"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (90.0, "90th"), (99.9, "99.9th")]
)
def test_ordinal_numbers(number: float, wanted: str) -> None:
    assert _ordinal(number) == wanted
