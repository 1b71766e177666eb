"""State of a user's subclass over a resume; steps that saving takes; `evaluated_state`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim import EMA, OptimCallback, WeightAveraging, evaluated_state
from lightning_optim.runtime import callback_state
from tests.harness import models, run
from tests.harness.cells import Cell
from tests.harness.process_group import Group
from tests.integration.entry_fits import Fitted, StatelessOptimizer, copied, differences, each_entry, fit
from tests.lightning import LightningModule, ModelCheckpoint, ModelParallelStrategy, Trainer
from tests.registry import BY_NAME, Entry

STEPS = Cell("automatic", "32-true", "single", "1")

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")


class PathLength(OptimCallback):
    """Sum the distances that each weight moves in a step; remember the last weight. Under FSDP2 both are shards."""

    def reset(self) -> None:
        self.length: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for name, weight in pl_module.named_parameters():
            before = self.last.get(name, torch.zeros_like(weight))
            self.length[name] = self.length.get(name, torch.zeros_like(weight)) + (weight - before).abs()
            self.last[name] = weight.detach().clone()

    def extra_state(self) -> dict[str, Any]:
        return {"length": dict(self.length), "last": dict(self.last), "count": len(self.length)}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.loaded = extra

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loaded = vars(self).pop("loaded", None)
        if loaded:
            assert loaded["count"] == len(loaded["length"])
            live = dict(pl_module.named_parameters())
            self.length = {name: _placed(saved, live[name]) for name, saved in loaded["length"].items()}
            self.last = {name: _placed(saved, live[name]) for name, saved in loaded["last"].items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.then = copied(self.length)


def _placed(saved: Tensor, weight: Tensor) -> Tensor:
    """Shard a tensor that comes from a checkpoint file; from a distributed checkpoint it comes as a shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor) and not isinstance(saved, DTensor):
        return distribute_tensor(saved, weight.device_mesh, weight.placements)
    return saved


def resumed_subclass(cell: Cell, folder: Path, distributed: bool) -> tuple[Any, ...]:
    """Return the state after a whole run, and after one that was resumed in the middle."""

    def options() -> dict[str, Any]:
        return {"strategy": run.fsdp2(distributed)} if cell.strategy == "fsdp2" else {}

    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, then = PathLength(), PathLength()
    fit(BY_NAME["plain"], cell, callbacks=[whole], extra=(saver,), enable_checkpointing=True, **options())
    path = folder / "step=3.ckpt"
    fit(BY_NAME["plain"], cell, callbacks=[then], ckpt_path=path, **options())
    return whole.then, then.then, then.steps, path.is_dir()


def test_subclass_resumes(tmp_path: Path) -> None:
    whole, then, steps, _ = resumed_subclass(STEPS, tmp_path, False)
    assert steps == [8]
    assert not differences(then, whole)
    assert all(bool((length > 0).any()) for length in whole.values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("distributed", [False, True])
def test_subclass_resumes_in_two_processes(strategy: Any, distributed: bool, group: Group, tmp_path: Path) -> None:
    if strategy == "ddp":
        tmp_path = tmp_path / f"ddp-{distributed}"
    for whole, then, steps, folder in group.run(
        resumed_subclass, Cell("automatic", "32-true", strategy, "1"), tmp_path, distributed
    ):
        assert folder == (distributed and strategy == "fsdp2")
        assert steps == [8]
        assert not differences(then, whole)


# ---- names with slashes ----------------------------------------------------------------------------------------------


def saved_shards(folder: Path) -> tuple[Tensor, Tensor]:
    """Return a shard of a module whose name has a slash as a checkpoint brings it back, and as it was saved."""
    module = nn.ModuleDict({"a/b": nn.Linear(3, 4)})
    torch.distributed.fsdp.fully_shard(module["a/b"])
    (weight, _) = module.parameters()
    state = {"last": {"a/b.weight": weight.detach() * 2}}
    trainer: Any = SimpleNamespace(strategy=ModelParallelStrategy(), optimizers=[None], ckpt_path=folder)
    checkpoint: dict[str, Any] = {"optimizer_states": [{}]}
    callback_state.save_shards(lambda: state, trainer, checkpoint, "key")
    dcp.save({f"optimizer_{i}": saved for i, saved in enumerate(checkpoint["optimizer_states"])}, checkpoint_id=folder)
    loaded = {"callbacks": {"key": callback_state.export(state, trainer)}}
    callback_state.load_shards(trainer, module, loaded, "key")  # type: ignore[arg-type]
    back = loaded["callbacks"]["key"]["last"]["a/b.weight"]
    return back.to_local().clone(), (weight.detach() * 2).to_local().clone()


def test_a_shard_of_a_module_whose_name_has_a_slash(group: Group, tmp_path: Path) -> None:
    for back, saved in group.run(saved_shards, tmp_path):
        assert torch.equal(back, saved)


def test_tensors_of_ranks_of_modules_whose_names_have_slashes() -> None:
    """As ``nn.ModuleDict({"a/b": …})`` makes them; dictionaries in the state may be nested, or not be there."""
    first, second = (
        {path: torch.full((), float(rank)) for path in ("buffers/a/b.mean", "memory/0/1/a/b.mean", "own/c/d.mean")}
        for rank in (0, 1)
    )
    state: dict[str, Any] = {"buffers": {"x": torch.ones(())}, "memory": {"0": {"1": {}}}}
    checkpoint = {"callbacks": {"key": {**state, "of_each_rank": [first, second]}}}
    trainer: Any = SimpleNamespace(world_size=2, global_rank=1)
    callback_state.load_ranks(trainer, checkpoint, "key")
    one = torch.ones(())
    assert checkpoint["callbacks"]["key"] == {
        "buffers": {"x": one, "a/b.mean": one},
        "memory": {"0": {"1": {"a/b.mean": one}}},
        "own": {"c/d.mean": one},
    }


# ---- saving takes no step --------------------------------------------------------------------------------------------


def with_and_without_saving(folder: Path) -> list[Any]:
    """Return the outcome of a run with a checkpoint, for which torch takes a step with lr 0, and of one without."""
    cell, outcomes = Cell("automatic", "32-true", "fsdp2", "1"), []
    for saver in ((), (ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=False),)):
        average = WeightAveraging(EMA(0.9))
        options: dict[str, Any] = {"extra": saver, "enable_checkpointing": bool(saver), "strategy": run.fsdp2()}
        fitted = fit(BY_NAME["plain"], cell, StatelessOptimizer, callbacks=[average], **options)
        outcomes.append((average.steps, fitted.module.validations, models.full_weights(fitted.module)))
    return outcomes


def test_saving_a_stateless_optimizer_takes_no_step(group: Group, tmp_path: Path) -> None:
    for without, saving in group.run(with_and_without_saving, tmp_path):
        assert without[0] == saving[0] == [8]
        assert not differences(saving, without)


# ---- what is evaluated -----------------------------------------------------------------------------------------------


class Asking(LightningModule):
    """Copy the evaluated state at the end of each batch and in each validation."""

    def on_train_batch_end(self: Any, *_: Any) -> None:
        vars(self).setdefault("between", []).append(copied(evaluated_state(self.trainer)))
        self.own = copied(dict(self.state_dict()))

    def on_validation_start(self: Any) -> None:
        state = evaluated_state(self.trainer)
        vars(self).setdefault("within", []).append((copied(state), copied(dict(self.state_dict()))))


@each_entry
def test_evaluated_state(entry: Entry) -> None:
    """Within a validation it equals the state of the module, and before one the state that the module will have."""
    fitted = fit(entry, STEPS, Asking)
    for state, held in fitted.module.within:
        assert not differences(state, held)
    for index, (state, _) in enumerate(fitted.module.within):
        before = fitted.module.between[STEPS.validate_every * (index + 1) - 1]
        assert not differences(before, state)
    averages = bool(differences(fitted.module.between[-1], fitted.module.own))
    assert averages == any(callback.evaluates for callback in fitted.ours)


def test_evaluated_state_is_live() -> None:
    class Looking(LightningModule):
        def on_train_batch_end(self: Any, *_: Any) -> None:
            self.pointers = {name: tensor.data_ptr() for name, tensor in evaluated_state(self.trainer).items()}

    raw: Fitted = fit(BY_NAME["plain"], STEPS, Looking, callbacks=[])
    assert raw.module.pointers == {name: p.data_ptr() for name, p in raw.module.named_parameters()}
    average = WeightAveraging(EMA(0.9), apply_at_end=False)
    averaged = fit(BY_NAME["plain"], STEPS, Looking, callbacks=[average])
    assert not set(averaged.module.pointers.values()) & {p.data_ptr() for p in averaged.module.parameters()}
