"""Test two processes: ranks that disagree, and the best weights of a sharded model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_optim import EMA, EarlyStopping, WeightAveraging
from tests.harness import run
from tests.harness.process_group import Group
from tests.lightning import DDPStrategy, ModelCheckpoint, Strategy, Trainer
from tests.stopping.scripted_fits import Scripted, fit, same


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights, gathered."""
    named = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in named.items()}


class Ranked(Scripted):
    """Log other scores on each rank."""

    def __init__(self, *scores: list[float]) -> None:
        super().__init__()
        self.ranked, self.validated = scores, []

    def on_validation_start(self) -> None:
        self.scores = {"val_loss": self.ranked[self.global_rank % len(self.ranked)]}

    def on_validation_end(self) -> None:
        self.validated.append(whole(self))


class Sharded(Ranked):
    """Under FSDP2; of a weight with one row the second rank has nothing."""

    def configure_model(self) -> None:
        if not hasattr(self, "_sharded"):
            self._sharded = True
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def two(strategy: Strategy, *callbacks: Any, **options: Any) -> dict[str, Any]:
    run.share_mesh()
    parallel = {"strategy": strategy, "plugins": [run.LivingEnvironment()], "devices": 2}
    return {**parallel, "use_distributed_sampler": False, **options}


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def disagreeing(scores: tuple[list[float], ...], arguments: dict[str, Any], options: dict[str, Any]) -> Any:
    module, stop = Ranked(*scores), EarlyStopping("val_loss", **arguments)
    trainer = fit(module, stop, **two(DDPStrategy(), **options))
    kept = [index for index, seen in enumerate(module.validated) if same(seen, whole(module))]
    said = (stop.stopping_reason.name, stop.stopping_reason_message)
    return trainer.current_epoch, stop.best_check, kept, said, float(stop.best_score)


FALLING, FLAT = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], [5.0, 6.0, 6.0, 6.0, 6.0, 6.0]


def test_one_rank_is_enough_to_stop(group: Group) -> None:
    for scores in ((FALLING, FLAT), (FLAT, FALLING)):
        ends = group.run(disagreeing, scores, {"patience": 2}, {})
        assert [end[0] for end in ends] == [3, 3]
        stopped, other = ends if scores[0] is FLAT else ends[::-1]
        assert stopped[3] == (
            "PATIENCE_EXHAUSTED",
            "Monitored metric 'val_loss' did not improve in the last 2 checks. Best score: 5.000.",
        )
        assert other[3] == ("PATIENCE_EXHAUSTED", f"Another rank decided to stop. {stopped[3][1]}")


def test_the_reason_of_another_rank(group: Group) -> None:
    nan = [5.0, float("nan"), 3.0]
    assert [end[3][0] for end in group.run(disagreeing, (FALLING, nan), {}, {})] == ["NON_FINITE_METRIC"] * 2


@pytest.mark.parametrize("best_by", [None, "val_loss"])
def test_rank_0_says_what_is_the_best(best_by: Any, group: Group) -> None:
    """Weights of different checks on two ranks would be a model that never was."""
    first, second = [5.0, 1.0, 2.0], [5.0, 6.0, 4.0]
    for scores, best in (((first, second), 1), ((second, first), 2)):
        ends = group.run(disagreeing, scores, {"best_by": best_by, "patience": math.inf}, {"max_epochs": 3})
        assert [end[1:3] for end in ends] == [(best, [best])] * 2
        assert [end[4] for end in ends] == [min(scores[0]), min(scores[1])]


def test_ranks_agree_on_withdrawing_a_stop(group: Group) -> None:
    """Else one would go on after `min_epochs` and wait for the other for ever."""
    first, second = [1.0, 2.0, 0.5, 0.4, 0.3, 0.2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    options = {"min_epochs": 4, "max_epochs": 6}
    for scores, epochs in (((first, second), 4), ((second, first), 4), ((first, first), 6)):
        ends = group.run(disagreeing, scores, {"patience": 1}, options)
        assert [end[0] for end in ends] == [epochs] * 2


# ---- a sharded model -------------------------------------------------------------------------------------------------

SCORES = [3.0, 1.0, 2.0, 2.0]


def after_a_fit(folder: Path, distributed: bool, in_directory: bool, average: bool) -> Any:
    def callbacks() -> list[Any]:
        stop = EarlyStopping("val_loss", patience=math.inf, dirpath=str(folder / "best") if in_directory else None)
        return [stop, *([WeightAveraging(EMA(0.9))] if average else [])]

    def train(module: Any, **options: Any) -> tuple[Trainer, Any]:
        used = callbacks()
        return fit(module, *used, **two(run.fsdp2(distributed), **options)), used[0]

    straight, first, again = Sharded(SCORES), Sharded(SCORES), Sharded(SCORES)
    train(straight, max_epochs=4)
    trainer, _ = train(first, max_epochs=3)
    trainer.save_checkpoint(folder / "after.ckpt")
    best = same(whole(first), first.validated[1])
    _, stop = train(again, max_epochs=4, ckpt_path=folder / "after.ckpt")
    raw = [same(one, other) for one, other in zip(again.validated, straight.validated[3:], strict=True)]
    return best, raw, same(whole(again), whole(straight)), same(whole(again), straight.validated[1]), stop.best_check


@pytest.mark.parametrize(
    ("distributed", "in_directory", "average"),
    [(False, False, True), (True, False, False), (False, True, False), (True, True, True)],
)
def test_a_file_written_after_a_fit(
    distributed: bool, in_directory: bool, average: bool, group: Group, tmp_path: Path
) -> None:
    for end in group.run(after_a_fit, tmp_path, distributed, in_directory, average):
        assert end == (True, [True], True, True, 1)


def going_back() -> Any:
    stop = EarlyStopping("val_loss", patience=math.inf)

    class GoingBack(Sharded):
        def on_validation_end(self) -> None:
            super().on_validation_end()
            if len(self.validated) == 3:
                stop.restore_best_(self)
                self.went_back = whole(self)
                self.predicted = self.net(torch.ones(1, 3))

    module, straight = GoingBack(SCORES), Sharded(SCORES)
    fit(module, stop, **two(run.fsdp2(False), max_epochs=3))
    fit(straight, EarlyStopping("val_loss"), **two(run.fsdp2(False), max_epochs=2))
    predicted = straight.net(torch.ones(1, 3))
    return same(module.went_back, module.validated[1]), torch.equal(module.predicted, predicted)


def test_restore_after_a_validation_of_a_sharded_model(group: Group) -> None:
    """Restore into the shards although the root is still gathered, so that the next forward uses them."""
    assert group.run(going_back) == [(True, True)] * 2


class ShardedAdapted(Sharded):
    """Leave a frozen base out of checkpoints until it is trained."""

    def __init__(self, *scores: list[float]) -> None:
        super().__init__(*scores)
        self.strict_loading = False
        self.base = nn.Linear(3, 3).requires_grad_(False)

    def configure_model(self) -> None:
        if not hasattr(self, "_sharded"):
            fully_shard(self.base, mesh=self.device_mesh["data_parallel"])
        super().configure_model()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([self.base(batch[0]), batch[1]], batch_idx)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.base.requires_grad_(True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in [name for name in checkpoint["state_dict"] if name.startswith("base")]:
            if not self.base.weight.requires_grad:
                del checkpoint["state_dict"][name]


def adapted(folder: Path) -> Any:
    module = ShardedAdapted(SCORES)
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    stop = EarlyStopping("val_loss", patience=math.inf)
    fit(module, stop, saver, **two(run.fsdp2(False), max_epochs=4, enable_checkpointing=True))
    moved = not torch.equal(module.validated[3]["base.weight"], module.validated[1]["base.weight"])
    names = {}
    for path in sorted(folder.glob("*.ckpt")):
        (state,) = [s for s in torch.load(path, weights_only=True)["callbacks"].values() if "best_check" in s]
        names[path.stem] = sorted(name for name in state["best"] if name.startswith("base"))
    return moved, same(whole(module), module.validated[1]), names


def test_a_frozen_base_of_a_sharded_model(group: Group, tmp_path: Path) -> None:
    """Keep the base only when it has been trained, as checkpoints do."""
    base = ["base.bias", "base.weight"]
    for moved, best, names in group.run(adapted, tmp_path):
        assert moved
        assert best
        assert names == {"epoch=0": [], "epoch=1": [], "epoch=2": base, "epoch=3": base}
