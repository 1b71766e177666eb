"""Read and set what ``self.log`` and torchmetrics have gathered in an epoch.

States are tensors and plain values, so that a checkpoint that holds them loads with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_optim.runtime.copied_state import copied_state
from lightning_optim.runtime.lightning import Trainer, logger_connector, metrics

# A checkpoint names a reduction by its index here: nothing that a checkpoint says is looked up among all functions.
_REDUCTIONS = (torch.mean, torch.sum, torch.max, torch.min, sum, max, min)
_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)


def metric_updates(trainer: Trainer) -> dict[str, int]:
    """Return how often each torchmetrics metric of the module was updated since its reset, by name."""
    modules = trainer.lightning_module.named_modules()
    return {name: module.update_count for name, module in modules if isinstance(module, Metric)}


def logged_values(trainer: Trainer, without_metrics: Collection[str]) -> dict[str, Any]:
    """Copy to the CPU what was logged so far in this epoch, the metrics that callbacks see, and those of torchmetrics.

    Args:
        trainer: A Trainer that fits.
        without_metrics: Names of torchmetrics metrics that are left out.
    """
    updates = {name: count for name, count in metric_updates(trainer).items() if count and name not in without_metrics}
    modules, results = dict(trainer.lightning_module.named_modules()), logger_connector.results(trainer).values()
    return {
        "shown": copied_state(logger_connector.shown_metrics(trainer), "cpu"),
        "hook": logger_connector.log_position(trainer)[0],
        # A process group cannot be saved, so a value that is reduced over a group of the user's starts anew.
        "results": [_result(m) for m in results if not m.has_reset and m.meta.sync.group is None],
        "metrics": {name: [count, copied_state(modules[name].metric_state, "cpu")] for name, count in updates.items()},
    }


def set_logged_values_(trainer: Trainer, state: dict[str, Any], batches: int) -> None:
    """Set the logged values to a copy that :func:`logged_values` returned.

    Args:
        trainer: A Trainer that fits.
        state: The copy.
        batches: Number of batches of the running epoch that are done; 0 between epochs.
    """
    logger_connector.set_shown_metrics(trainer, copied_state(state["shown"], trainer.strategy.root_device))
    # When a hook logs in an epoch's first batch, Lightning drops its earlier values: here it is not the first.
    logger_connector.set_log_position(trainer, state["hook"], batches == 1 if batches else None)
    modules = dict(trainer.lightning_module.named_modules())
    for name, (count, values) in state["metrics"].items():
        metric = modules.get(name)
        if isinstance(metric, Metric) and metric.metric_state.keys() == values.keys():
            for key, value in values.items():
                setattr(metric, key, copied_state(value, metric.device))
            metrics.restore_(metric, count)
    for result in state["results"]:
        _set_result_(trainer, result, modules)


def epoch_sums(trainer: Trainer) -> dict[str, Any]:
    """Copy the sums from which the means of the running epoch are computed at its end; on their devices."""
    sums = {name: copied_state(result.metric_state) for name, result in _summed(trainer) if not result.has_reset}
    return {"epoch": trainer.current_epoch, "sums": sums}


def set_epoch_sums_(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set the running epoch's sums to what :func:`epoch_sums` returned; to nothing if that was in an earlier epoch.

    Values of the present batch, which are logged at its end, stay as they are.
    """
    if state["epoch"] != trainer.current_epoch:
        for result in logger_connector.results(trainer).values():
            result.reset()
        return
    for name, result in _summed(trainer):
        if name not in state["sums"]:
            result.reset()
            continue
        for key, value in copied_state(state["sums"][name], trainer.strategy.root_device).items():
            setattr(result, key, value)
        result.has_reset = False
        metrics.forget_value_(result)


def _summed(trainer: Trainer) -> list[tuple[str, Any]]:
    results = logger_connector.results(trainer).items()
    return [(name, result) for name, result in results if result.is_tensor and result.meta.on_epoch]


def _result(result: Any) -> dict[str, Any]:
    """Return one logged name: its options, and the value so far."""
    meta, last = result.meta, logger_connector.last_value(result)
    return {
        "meta": {name: getattr(meta, name) for name in _META},
        "reduction": _REDUCTIONS.index(meta.reduce_fx),
        "sync": [meta.sync.should, meta.sync.rank_zero_only],
        "states": copied_state(result.metric_state, "cpu") if result.is_tensor else None,
        "last": copied_state(last, "cpu") if isinstance(last, Tensor) else None,
    }


def _set_result_(trainer: Trainer, state: dict[str, Any], modules: dict[str, Any]) -> None:
    meta, (sync, rank_zero_only) = state["meta"], state["sync"]
    value = modules.get(meta["metric_attribute"]) if state["states"] is None else torch.zeros(())
    if not isinstance(value, Tensor | Metric):
        return
    results = logger_connector.results(trainer)
    # Logged once, so that Lightning builds the entry, and without reduction, so that no collective is called here.
    results.log(
        value=value,
        reduce_fx=_REDUCTIONS[state["reduction"]],
        sync_dist_fn=trainer.strategy.reduce,
        batch_size=1,
        rank_zero_only=rank_zero_only,
        **meta,
    )
    result = results[f"{meta['fx']}.{meta['name']}"]
    result.meta.sync.should = sync
    for key, tensor in (state["states"] or {}).items():
        setattr(result, key, copied_state(tensor, trainer.strategy.root_device))
    logger_connector.set_last_value(result, copied_state(state["last"], trainer.strategy.root_device))
