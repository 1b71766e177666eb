"""GradientClipping with a bound for each pattern or each optimizer: who gets which gradients, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD

from lightning_optim import (
    AutoClip,
    Centralize,
    ClipByNorm,
    ClipByValue,
    GradientClipping,
    GradientMonitor,
    Noise,
    ZClip,
)
from lightning_optim.gradients.clipping_plan import parts_of
from tests.gradients.test_gradient_clipping import CELL, Bad, Spy, _fit
from tests.harness import models, run
from tests.harness.cells import Cell
from tests.lightning import Callback, LightningModule, MisconfigurationException, Trainer

TWO = Cell("two", "32-true", "single", "1")


class Norms(Callback):
    """Store the norms of the gradients that the optimizers use, by a part of the name."""

    def __init__(self, *parts: str) -> None:
        self.norms: dict[str, list[float]] = {part: [] for part in parts}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for part, norms in self.norms.items():
            own = [p.grad for name, p in pl_module.named_parameters() if part in name and p.grad is not None]
            if own:
                norms.append(math.sqrt(sum(float(grad.square().sum()) for grad in own)))


# ---- patterns --------------------------------------------------------------------------------------------------------


def test_each_pattern_gets_its_parameters_and_the_first_wins() -> None:
    bias, inner, rest = Spy(1.0), Spy(1.0), Spy(1.0)
    _fit(GradientClipping({"*.bias": bias, "*.inner.*": inner, "*": rest}))
    assert bias.saw == [(5,), (3,)]
    assert inner.saw == [(5, 8)]
    assert rest.saw == [(1,), (3, 5)]
    assert bias.norm is None, "the norm of all is not that of a part"


def test_each_pattern_has_a_norm_of_its_own_and_what_none_matches_is_not_clipped() -> None:
    free, norms = Norms("scale"), Norms("inner", "outer", "scale")
    _fit(GradientClipping(math.inf), free, max_epochs=1)
    _fit(GradientClipping({"*.inner.*": 1e-2, "*.outer.*": 1e-3}), norms, max_epochs=1)
    assert norms.norms["inner"] == pytest.approx([1e-2] * len(norms.norms["inner"]), rel=1e-3)
    assert norms.norms["outer"] == pytest.approx([1e-3] * len(norms.norms["outer"]), rel=1e-2)
    assert norms.norms["scale"][0] == pytest.approx(free.norms["scale"][0])
    assert min(norms.norms["scale"]) > 1e-2


def test_a_policy_of_a_pattern_has_a_selection_of_its_own() -> None:
    spy = Spy(1.0, exclude="*.bias")
    _fit(GradientClipping({"*.inner.*": [Centralize(), spy], "*": 1.0}))
    assert spy.saw == [(5, 8)]


def test_a_tied_parameter_belongs_to_the_first_pattern_that_matches_any_of_its_names() -> None:
    class Tied(models.Model):
        def __init__(self, cell: Cell) -> None:
            super().__init__(cell)
            self.alias = self.nets[0].get_submodule("inner")

    first, second = Spy(1.0), Spy(1.0)
    clipping = GradientClipping({"alias.weight": first, "*.inner.*": second})
    run.make_trainer(CELL, [clipping]).fit(Tied(CELL))
    assert (first.saw, second.saw) == ([(5, 8)], [(5,)])


def test_one_policy_object_in_two_places_remembers_each_by_itself() -> None:
    policy = AutoClip(50.0)
    clipping = GradientClipping({"*.inner.*": policy, "*.outer.*": policy})
    _fit(clipping)
    one, other = (copy.state_dict()["recent"]["rows"] for copy in clipping._copies[0])
    assert len(one) == len(other) == 12
    assert not torch.equal(one, other)


def test_the_logged_norm_is_the_whole_norm() -> None:
    _, plain, _ = _fit(GradientClipping(math.inf), max_epochs=1)
    _, logged, _ = _fit(GradientClipping({"*.inner.*": 1e-2, "*": 1e6}), max_epochs=1)
    assert logged["gradients/norm"][0] == pytest.approx(plain["gradients/norm"][0])


def test_a_step_that_is_not_finite_is_skipped_also_for_parameters_that_no_pattern_matches() -> None:
    clipping, bad = GradientClipping({"*.inner.*": 0.5}), Bad({1, 2})  # the bad gradient is that of the scale
    module, *_ = _fit(clipping, bad)
    assert clipping.skipped == [2]
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_step_is_clipped_if_one_pattern_clips() -> None:
    shares = []
    for bounds in ({"*.inner.*": 1e-3, "*": 1e6}, {"*.inner.*": 1e6, "*": 1e6}):
        recorder = run.Recorder()
        callbacks = [GradientMonitor(), GradientClipping(bounds)]
        run.make_trainer(CELL, callbacks, logger=recorder).fit(models.build(CELL))
        shares.append(list(recorder.logged["gradients/share_clipped"].values())[-1])
    assert shares == [1.0, 0.0]


@pytest.mark.parametrize(
    ("bounds", "sentence"),
    [
        ({"encoder.*": 1.0, "*": 2.0}, r"the pattern 'encoder.\*' in `policy` matches no parameter of Model. Its"),
        ({"net.iner.*": 1.0}, r"matches no parameter of Model; did you mean 'net.inner.\*'\?"),
        ({"*": 1.0, "*.inner.*": 0.1}, r"'\*.inner.\*' in `policy` has no parameter left.*put it before '\*'"),
        ({"*.inner.*": ClipByNorm(1.0, on="*.outer.*")}, "the policy chooses no parameter of this pattern"),
        ({"*.inner.*": ClipByNorm(1.0, on="head.*")}, r"`on='head.\*'` matches no parameter"),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(bounds: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _fit(GradientClipping(bounds))


def test_a_star_for_the_rest_may_find_no_rest() -> None:
    norms = Norms("inner")
    _fit(GradientClipping({"net.*": 1e-2, "*": 1.0}), norms)
    assert max(norms.norms["inner"]) <= 1e-2


# ---- optimizers ------------------------------------------------------------------------------------------------------


def test_an_optimizer_without_an_entry_is_not_clipped() -> None:
    norms, monitor = Norms("net.0", "net.1"), GradientMonitor()
    _, logged, _ = _fit(GradientClipping({1: 1e-3}), norms, TWO, max_epochs=1)
    assert min(norms.norms["net.0"]) > 1e-2
    assert max(norms.norms["net.1"]) <= 1e-3
    assert {"gradients/norm/0", "gradients/norm/1"} <= set(logged)
    recorder = run.Recorder()
    run.make_trainer(TWO, [monitor, GradientClipping({1: 1e-3})], logger=recorder).fit(models.build(TWO))
    assert "gradients/share_clipped/0" not in recorder.logged
    assert set(recorder.logged["gradients/share_clipped/1"].values()) == {1.0}


def test_each_optimizer_has_the_norm_of_its_first_policy() -> None:
    policies = {0: ClipByNorm(1e6), 1: ClipByNorm(1e6, norm_type=math.inf)}
    clipping = GradientClipping(policies)
    assert [clipping.norm_type_of(index) for index in range(3)] == [2.0, math.inf, 2.0]
    _, logged, _ = _fit(clipping, None, TWO, max_epochs=1)
    _, plain, _ = _fit(GradientClipping(math.inf), None, TWO, max_epochs=1)
    assert logged["gradients/norm/0"][0] == pytest.approx(plain["gradients/norm/0"][0])
    assert logged["gradients/norm/1"][0] < plain["gradients/norm/1"][0]


def test_an_index_beyond_the_optimizers_is_refused_before_the_first_step() -> None:
    module = models.build(CELL)
    with pytest.raises(
        MisconfigurationException, match=r"a bound for optimizer 1, and the optimizers of Model are 0 \(SGD\): write"
    ):
        run.make_trainer(CELL, [GradientClipping({0: 1.0, 1: 0.1})]).fit(module)
    assert module.seen == 0


# ---- arguments, state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ({}, r"`policy={}` must be a number > 0.*at least one"),
        ({"a": 1.0, 0: 1.0}, "all keys of one kind"),
        ({True: 1.0}, "all keys of one kind"),
        ({-1: 1.0}, "indices of optimizers"),
        ({torch.nn.Linear: 1.0}, "patterns over parameter names"),
        ({"head.*": 0.0}, r"`policy\['head.\*'\]=0.0` must be a number > 0, a clipping policy or a list of them$"),
        ({0: []}, r"`policy\[0\]=\[\]` must be"),
        ({0: {"a": 1.0}}, r"`policy\[0\]=\{'a': 1.0\}` must be"),
        ({0: "1.0"}, r"`policy\[0\]='1.0'` must be"),
        ([{0: 1.0}], r"`policy=\[\{0: 1.0\}\]` must be"),
    ],
)
def test_wrong_arguments(policy: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GradientClipping(policy)


def test_the_argument_is_kept_as_written() -> None:
    for policy in (1.0, ClipByValue(1.0), [1.0, ZClip()], {"head.*": 1.0, "*": [ZClip(), 2.0]}, {0: 1.0}):
        assert GradientClipping(policy).policy is policy


def test_patterns_and_indices_are_part_of_the_state_key_and_bounds_are_not() -> None:
    keys = [GradientClipping(p).state_key for p in (1.0, {"*": 1.0}, {"net.*": 1.0}, {0: 1.0}, {1: 1.0})]
    assert len(set(keys)) == len(keys)
    assert GradientClipping({"a.*": 1.0, "*": [2.0]}).state_key == GradientClipping({"a.*": 3.0, "*": 4.0}).state_key
    assert GradientClipping([1.0]).state_key == GradientClipping(2.0).state_key


@pytest.mark.parametrize(
    "policy",
    [
        lambda: {"*.inner.*": AutoClip(50.0), "*": [ZClip(z=1.0, warmup=2), Noise(0.1)]},
        lambda: {1: [AutoClip(50.0)], 0: Noise(0.1)},
    ],
    ids=["patterns", "optimizers"],
)
def test_a_resumed_run_is_the_run_that_was_not_killed(policy: Any, tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    whole = models.build(TWO)
    run.make_trainer(TWO, [GradientClipping(policy()), run.SaveAfterBatch(path, batch=5)], max_epochs=3).fit(whole)
    resumed = models.build(TWO)
    run.make_trainer(TWO, [GradientClipping(policy())], max_epochs=3).fit(resumed, ckpt_path=path, weights_only=True)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_parts_keep_the_order_in_which_they_act() -> None:
    parts = parts_of({"a.*": [1.0, ClipByValue(2.0)], "*": 3.0})
    assert [(part.pattern, part.earlier) for part in parts] == [("a.*", ()), ("a.*", ()), ("*", ("a.*",))]


def test_an_optimizer_that_gets_a_new_parameter_follows_the_patterns() -> None:
    class Growing(models.Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.seen == 2:
                self.head = torch.nn.Linear(2, 2)
                (optimizer,) = self.trainer.optimizers
                assert isinstance(optimizer, SGD)
                optimizer.add_param_group({"params": list(self.head.parameters())})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + 100.0 * self.head(torch.ones(2)).sum() if hasattr(self, "head") else loss

    norms = Norms("head", "net")
    run.make_trainer(CELL, [GradientClipping({"net.*": 1e-2, "*": 0.5}), norms]).fit(Growing(CELL))
    assert norms.norms["head"] == pytest.approx([0.5] * len(norms.norms["head"]), rel=1e-4)
    assert max(norms.norms["net"]) <= 1e-2


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ({0: [ClipByValue(0.5), 1.0]}, ["clip value 0.5 → clip norm 1.0", ""]),
        ({"a.*": 1.0, "*": 0.5}, ["clip norm 1.0 on a.*, clip norm 0.5 on *"] * 2),
    ],
)
def test_the_line_at_the_start_says_who_is_clipped_how(policy: Any, wanted: list[str]) -> None:
    clipping = GradientClipping(policy)
    assert [clipping.describe_step(index)[0] for index in range(2)] == wanted


# ---- which steps were clipped ----------------------------------------------------------------------------------------


class HalfOfTheSteps(LightningModule):
    """Use one of two layers, so that a clipping of the first has nothing to do in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(2))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers[batch_idx % 2](batch).sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("policy", "end", "flags"),
    [
        (ClipByValue(0.1, on="layers.0.*"), "0 of 4 steps skipped", [None] * 4),
        ([ClipByNorm(1e3), ClipByValue(0.1, on="layers.0.*")], "0 of 4 steps skipped", [None] * 4),
        (ClipByNorm(0.1, on="layers.0.*"), "0 of 4 steps skipped, 50 % clipped", [True, False] * 2),
    ],
    ids=str,
)
def test_a_share_of_clipped_steps_is_told_only_if_every_policy_can_tell(policy: Any, end: str, flags: Any) -> None:
    class Flags(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            flag = clipping.clipped(0)
            seen.append(flag if flag is None else bool(flag))

    clipping = GradientClipping(policy)
    seen: list[bool | None] = []
    Trainer(max_epochs=1, barebones=True, accelerator="cpu", callbacks=[clipping, Flags()]).fit(HalfOfTheSteps())
    assert seen == flags
    assert clipping.report() == end


def test_a_report_before_the_first_step_is_empty() -> None:
    clipping = GradientClipping(1.0)
    clipping.steps = [0]
    assert not clipping.report()


def test_a_list_of_bounds_is_not_one_for_each_optimizer() -> None:
    with pytest.raises(ValueError, match=r"Write one bound, or one for each optimizer: \{0: 1.0, 1: 0.5\}"):
        GradientClipping([1.0, 0.5])
