"""The private names of strategies, the GradScaler, pruning and checkpoints mean what the wall takes them for."""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from lightning_optim.runtime.lightning import checkpoint_times, precision, pruning, strategies
from lightning_optim.runtime.patching import patched
from tests.harness.process_group import Group
from tests.lightning import (
    AsyncCheckpointIO,
    Callback,
    DDPStrategy,
    LightningModule,
    MixedPrecision,
    ModelCheckpoint,
    ModelParallelStrategy,
    ModelPruning,
    TorchCheckpointIO,
    Trainer,
)
from tests.runtime.lightning.canaries import At, Model, canary, fit, numbers


@canary("_ddp_kwargs")
def test_whether_ddp_broadcasts() -> None:
    assert strategies.broadcasts_buffers(DDPStrategy())
    assert strategies.broadcasts_buffers(DDPStrategy(broadcast_buffers=True))
    assert not strategies.broadcasts_buffers(DDPStrategy(broadcast_buffers=False))
    assert not strategies.broadcasts_buffers(ModelParallelStrategy())


@canary("_save_distributed_checkpoint")
def test_whether_checkpoints_are_folders() -> None:
    def is_whole(strategy: ModelParallelStrategy) -> bool:
        asked: list[Any] = []
        strategy.connect(Model())
        with patched(state_dict, "get_model_state_dict", lambda module, options: asked.append(options)):
            strategy.lightning_module_state_dict()
        return asked[0].full_state_dict

    folders, files = (
        ModelParallelStrategy(save_distributed_checkpoint=True),
        ModelParallelStrategy(save_distributed_checkpoint=False),
    )
    assert strategies.writes_folders(folders) and not is_whole(folders)
    assert not strategies.writes_folders(files) and is_whole(files)
    for strategy in (folders, files, DDPStrategy()):
        before = strategies.writes_folders(strategy)
        with pytest.raises(ZeroDivisionError), strategies.writing_one_file(strategy):
            assert not strategies.writes_folders(strategy)
            assert not isinstance(strategy, ModelParallelStrategy) or is_whole(strategy)
            _ = 1 / 0
        assert strategies.writes_folders(strategy) is before


class Slow(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(0.2)
        super().save_checkpoint(*args, **kwargs)


@canary("_executor")
def test_checkpoints_in_the_background_are_complete() -> None:
    strategy = _trainer(plugins=[AsyncCheckpointIO(Slow())]).strategy
    strategies.finish_writing(strategy)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            strategy.checkpoint_io.save_checkpoint({}, Path(folder, f"before-{name}"))
            strategy.checkpoint_io.save_checkpoint({}, path := Path(folder, name))
            assert not path.exists()
            strategies.finish_writing(strategy)
            assert path.exists()
    strategy.checkpoint_io.teardown()
    strategies.finish_writing(strategy)
    strategies.finish_writing(_trainer().strategy)


def _trainer(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **options)


@canary("_MultiProcessingLauncher")
def test_launched_processes() -> None:
    kinds = {name: _trainer(strategy=name, devices=2) for name in ("ddp_spawn", "ddp_fork", "ddp_notebook", "ddp")} | {
        "one": _trainer(devices=1)
    }
    launched = [name for name, trainer in kinds.items() if strategies.launches_processes(trainer)]
    assert launched == ["ddp_spawn", "ddp_fork", "ddp_notebook"]
    assert all(hasattr(kinds[name].strategy.launcher, "get_extra_results") for name in launched)


def test_backward_without_reduction() -> None:
    for trainer in (_trainer(devices=1), _trainer(devices=1, strategy="ddp")):
        entered: list[bool] = []

        class Blocking:
            def __enter__(self) -> None:
                entered.append(True)  # noqa: B023

            def __exit__(self, *error: object) -> None:
                pass

        if trainer.world_size and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.block_backward_sync = Blocking  # type: ignore[method-assign]
        for block in (True, False):
            with strategies.without_reduction(trainer.strategy, block):
                pass
        assert entered == ([True] if isinstance(trainer.strategy, DDPStrategy) else [])


# ---- DDP's buffers ---------------------------------------------------------------------------------------------------


@canary("_check_sync_bufs_pre_fwd", "_sync_buffers")
def test_ddp_with_one_process() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.BatchNorm1d(2))
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(model=model))
        assert strategies.broadcast_is_due(trainer) is True
        strategies.share_buffers_(trainer)
        model.eval()
        model(torch.ones(2, 2))
        with torch.no_grad():
            model(torch.ones(2, 2))
        strategies.set_broadcast_is_due(trainer, False)
        assert strategies.broadcast_is_due(trainer) is False and not model.will_sync_module_buffers()
        strategies.share_buffers_(trainer)
        strategies.set_broadcast_is_due(trainer, True)
        assert model.will_sync_module_buffers()
    finally:
        dist.destroy_process_group()
    plain: Any = SimpleNamespace(strategy=SimpleNamespace(model=nn.BatchNorm1d(2)))
    assert strategies.broadcast_is_due(plain) is None
    strategies.set_broadcast_is_due(plain, True)
    strategies.share_buffers_(plain)


def _shared(due: bool, compiled: bool) -> tuple[float, bool]:
    model = DistributedDataParallel(nn.BatchNorm1d(1), broadcast_buffers=True)
    inner: Any = model.module
    inner.running_mean.fill_(float(dist.get_rank() + 1))
    wrapped = torch.compile(model, backend="eager") if compiled else model
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(model=wrapped))
    strategies.set_broadcast_is_due(trainer, due)
    strategies.share_buffers_(trainer)
    return float(inner.running_mean), bool(strategies.broadcast_is_due(trainer))


@pytest.mark.parametrize("compiled", [False, True])
def test_buffers_of_rank_0_are_shared_when_ddp_would(group: Group, compiled: bool) -> None:
    assert group.run(_shared, True, compiled) == [(1.0, True), (1.0, True)]
    assert group.run(_shared, False, compiled) == [(1.0, False), (2.0, False)]


# ---- precision -------------------------------------------------------------------------------------------------------


class Fused(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.1, fused=True)


def _gradients(model: Model, *, unscale: bool) -> list[float]:
    def setup(trainer: Trainer) -> None:
        if unscale:
            for optimizer in trainer.optimizers:
                precision.unscale_before_hooks(trainer, optimizer, setattr)

    grads = At("on_before_optimizer_step", lambda trainer: float(model.net.bias.grad))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(model, At("on_train_start", setup), grads, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return grads.seen


@canary("_step_supports_amp_scaling")
def test_fused_optimizers_are_unscaled_before_hooks() -> None:
    assert _gradients(Fused(), unscale=False)[0] == 1024.0
    assert _gradients(Fused(), unscale=True) == [1.0] * 4
    assert _gradients(Model(), unscale=True) == [1.0] * 4
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    del optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=torch.amp.GradScaler("cpu")))
    with pytest.raises(RuntimeError, match=r"AdamW: `_step_supports_amp_scaling` is gone.*torch"):
        precision.unscale_before_hooks(trainer, optimizer, setattr)


def test_a_strangers_fused_optimizer_unscales_as_it_says() -> None:
    class Stranger(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([nn.Parameter(torch.ones(1))], {"fused": True})

    patches: list[Any] = []
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=torch.amp.GradScaler("cpu")))
    precision.unscale_before_hooks(trainer, Stranger(), lambda *patch: patches.append(patch))
    assert not patches
    optimizer: Any = Stranger()
    optimizer._step_supports_amp_scaling = True
    precision.unscale_before_hooks(trainer, optimizer, lambda *patch: patches.append(patch))
    assert patches == [(optimizer, "_step_supports_amp_scaling", False)]


@canary("_per_optimizer_states")
def test_ranks_agree_on_an_overflow() -> None:
    for loss, overflow in ((1.0, True), (float("inf"), False)):
        weight = nn.Parameter(torch.ones(1))
        optimizer, scaler = torch.optim.SGD([weight], 0.0), torch.amp.GradScaler("cpu", init_scale=4.0)
        trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
        scaler.scale((weight * loss).sum()).backward()
        scaler.unscale_(optimizer)
        stepped: list[bool] = []
        optimizer.register_step_post_hook(lambda *args: stepped.append(True))  # noqa: B023
        precision.agree_on_overflow(trainer, optimizer, overflow)
        scaler.step(optimizer)
        scaler.update()
        assert bool(stepped) is not overflow and scaler.get_scale() == (2.0 if overflow else 4.0)
    optimizer = torch.optim.SGD([weight], 0.0)
    precision.agree_on_overflow(trainer, optimizer, True)  # nothing was unscaled, and so nothing is told
    del scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    with pytest.raises(RuntimeError, match=r"found_inf_per_device.*is gone.*torch"):
        precision.agree_on_overflow(trainer, optimizer, True)
    one: Any = SimpleNamespace(precision_plugin=SimpleNamespace())
    precision.agree_on_overflow(one, optimizer, True)
    assert precision.scale_of(one) == 1.0 and precision.scale_of(trainer) == 4.0


@canary("_after_closure")
def test_weights_change_after_all_hooks_and_just_before_the_step() -> None:
    order: list[str] = []

    class Ordered(Model):
        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            order.append("clip")

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer.register_step_post_hook(lambda *args: order.append("moved"))
            return optimizer

    class Acting(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            precision.after_gradients(trainer, lambda optimizer: order.append("act"), setattr)

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            order.append("backward")

    fit(Ordered(), Acting(), max_steps=1)
    assert order == ["backward", "clip", "act", "moved"]


# ---- pruning ---------------------------------------------------------------------------------------------------------


def _pruning(**options: Any) -> ModelPruning:
    return ModelPruning("l1_unstructured", **options)


@canary("_make_pruning_permanent")
def test_pruning_that_is_permanent_in_checkpoints() -> None:
    assert pruning.is_permanent_in_checkpoints(_pruning(make_pruning_permanent=True))
    assert not pruning.is_permanent_in_checkpoints(_pruning(make_pruning_permanent=False))
    assert not pruning.is_permanent_in_checkpoints(At("setup", print))


@canary("_prune_on_train_epoch_end")
def test_pruning_in_a_validation() -> None:
    assert pruning.prunes_in_validation(_pruning(prune_on_train_epoch_end=False))
    assert not pruning.prunes_in_validation(_pruning(prune_on_train_epoch_end=True))
    assert not pruning.prunes_in_validation(At("setup", print))
    for at_end, expected in ((True, "on_train_epoch_end"), (False, "on_validation_epoch_end")):
        model, hooks = Model(), []  # type: ignore[var-annotated]
        callback = _pruning(amount=0.5, parameters_to_prune=[(model.net, "weight")], prune_on_train_epoch_end=at_end)
        callback._run_pruning = lambda epoch: hooks.append(model._current_fx_name)  # type: ignore[method-assign] # noqa: B023
        fit(model, callback, validation=numbers(), training=numbers(1))
        assert hooks == [expected]


@canary("_use_lottery_ticket_hypothesis")
def test_pruning_that_resets_weights() -> None:
    assert pruning.resets_weights(_pruning(use_lottery_ticket_hypothesis=True))
    assert pruning.resets_weights(_pruning(use_lottery_ticket_hypothesis=lambda epoch: epoch > 2))
    assert not pruning.resets_weights(_pruning(use_lottery_ticket_hypothesis=False))


@canary("_tensor_name")
def test_name_of_a_pruned_parameter() -> None:
    layer = nn.Linear(2, 2)
    prune.l1_unstructured(layer, "bias", 1)  # type: ignore[no-untyped-call]
    (hook,) = layer._forward_pre_hooks.values()
    assert pruning.pruned_name(hook) == "bias"  # type: ignore[arg-type]
    assert {"bias_orig", "bias_mask"} <= {*dict(layer.named_parameters()), *dict(layer.named_buffers())}


@canary("_every_n_train_steps")
def test_checkpoints_by_steps() -> None:
    assert checkpoint_times.step_interval(ModelCheckpoint(every_n_train_steps=3)) == 3
    assert checkpoint_times.step_interval(ModelCheckpoint()) == 0


@canary("_train_time_interval")
def test_checkpoints_by_the_clock() -> None:
    assert checkpoint_times.time_interval(ModelCheckpoint(train_time_interval=timedelta(seconds=2))) == timedelta(0, 2)
    assert checkpoint_times.time_interval(ModelCheckpoint(every_n_train_steps=3)) is None


@canary("_should_save_on_train_epoch_end")
def test_checkpoints_after_validations() -> None:
    asked = At("on_train_start", lambda trainer: checkpoint_times.writes_after_validations(ModelCheckpoint(), trainer))
    fit(Model(), asked, validation=numbers())
    fit(Model(), asked, validation=numbers(), val_check_interval=2)
    steps = ModelCheckpoint(every_n_train_steps=3)
    by_steps = At("on_train_start", lambda trainer: checkpoint_times.writes_after_validations(steps, trainer))
    fit(Model(), by_steps, validation=numbers(), val_check_interval=2)
    assert (asked.seen, by_steps.seen) == ([False, True], [False])
