"""The private names of modules and metrics mean what `runtime/lightning/` takes them for."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from torchmetrics import MeanMetric

from lightning_optim.runtime.lightning import loading, metrics, modules
from tests.lightning import Trainer
from tests.runtime.lightning.canaries import At, Model, canary, fit, numbers


@canary("_current_fx_name")
def test_running_hook() -> None:
    model = Model()
    hooks = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_validation_batch_end")
    probes = [At(hook, lambda trainer: modules.running_hook(trainer.lightning_module)) for hook in hooks]
    fit(model, *probes, validation=numbers(1), training=numbers(1))
    assert [probe.seen for probe in probes] == [[hook] for hook in hooks]

    def log(trainer: Trainer) -> set[str]:
        modules.set_running_hook(model, "training_step")
        model.log("mine", 1.0)
        modules.set_running_hook(model, "on_train_batch_end")
        return set(trainer.fit_loop.epoch_loop._results)

    logged = At("on_train_batch_end", log)
    fit(model, logged, training=numbers(1))
    assert "training_step.mine" in logged.seen[0]


@canary("_trainer")
def test_attached_modules() -> None:
    model = Model()
    assert not modules.is_attached(model)
    inside = At("on_train_start", lambda trainer: modules.is_attached(model))
    fit(model, inside)
    assert inside.seen == [True]
    modules.detach_trainer(model)
    assert not modules.is_attached(model)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = model.trainer


@canary("_compiler_ctx")
def test_compiled_modules() -> None:
    model = Model()
    inside = At("on_fit_start", lambda trainer: modules.is_wrapped_to_compile(trainer.lightning_module))
    fit(model, inside, limit_train_batches=0)
    fit(torch.compile(model, backend="eager"), inside, limit_train_batches=0)  # type: ignore[arg-type]
    assert inside.seen == [False, True]
    modules.undo_compilation_(model)
    assert not modules.is_wrapped_to_compile(model)


@canary("_device_mesh")
def test_device_mesh() -> None:
    one, other, mesh = Model(), Model(), object()
    one._device_mesh = mesh  # type: ignore[assignment]
    modules.share_device_mesh(one, other)
    assert one.device_mesh is mesh and other.device_mesh is mesh


class Named(Model):
    def __init__(self, settings: dict[str, int]) -> None:
        super().__init__()
        self.save_hyperparameters(settings)


@canary("_instantiator")
def test_names_of_functions() -> None:
    """Lightning calls the function that a checkpoint names, or says which; before it gets there, the wall refuses."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "hostile.ckpt")
        hostile = {"state_dict": Model().state_dict(), "hyper_parameters": {"_instantiator": "no_such_module.call"}}
        torch.save({**hostile, "pytorch-lightning_version": "2.5.0"}, path)
        with pytest.raises((ValueError, ModuleNotFoundError), match="no_such_module"):
            Model.load_from_checkpoint(path)
    for key in ("hyper_parameters", "hparams", "module_arguments"):
        content = {key: hostile["hyper_parameters"]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "version_of", lambda kind: (2, 6, 5))
            with pytest.raises(ValueError, match=r"^a\.ckpt names a function, 'no_such_module\.call', .*2\.6\.6"):
                loading.check_names(Model, "a.ckpt", content)
            loading.check_names(Model, "a.ckpt", {key: {"other": 1}})
            patch.setattr(loading, "version_of", lambda kind: (2, 6, 6))
            loading.check_names(Model, "a.ckpt", content)


@canary("_hparams_name")
def test_name_of_hyper_parameters() -> None:
    model = Named({"width": 3})
    saved = At("on_train_end", lambda trainer: trainer._checkpoint_connector.dump_checkpoint())
    fit(model, saved)
    assert modules.hparams_name(model) == {"hparams_name": "settings"}
    assert saved.seen[0]["hparams_name"] == "settings"
    assert modules.hparams_name(Model()) == {}


@canary("_update_count", "_computed")
def test_metrics_go_on() -> None:
    known, metric = MeanMetric(), MeanMetric()
    for value in (1.0, 2.0):
        known.update(value)
    assert metric.compute().isnan()
    for name, value in known.metric_state.items():
        setattr(metric, name, value.clone())  # type: ignore[union-attr]
    assert metric.compute().isnan()  # it keeps what it computed
    metrics.restore_(metric, known.update_count)
    assert metric.update_count == 2 and metric.compute() == 1.5
    metric.update(3.0)
    assert metric.compute() == 2.0
    assert torch.equal(metric.compute(), torch.tensor(2.0))


@canary("_plot")
def test_plots_of_metrics() -> None:
    metric = MeanMetric()
    metric.update(3.0)
    for value, expected in (
        (None, [3.0]),
        (torch.tensor(2.0), [2.0]),
        ([torch.tensor(1.0), torch.tensor(2.0)], [1.0, 2.0]),
    ):
        figure, axes = metrics.plot(metric, value, None)
        assert [float(y) for line in axes.lines for y in line.get_ydata()] == expected
        assert axes.figure is figure
