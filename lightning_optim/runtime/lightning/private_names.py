"""List every private name of Lightning, torch and torchmetrics that the package uses, and read or write it.

A private name may change with any version. So each is used in one function of this folder, and listed in the table
below with its purpose, which errors and failed tests repeat. Private names of ``nn.Module`` are in
``base/module_registry.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torchmetrics

from lightning_optim.runtime.lightning.packages import imported_versions


class PrivateName(NamedTuple):
    """Describe a private name: the function of this folder that uses it, and the purpose."""

    name: str
    used_in: str
    purpose: str

    def message(self) -> str:
        """Return a sentence that says what is broken if the name is gone, and where to mend it."""
        module, function = self.used_in.split(".")
        return (
            f"`{self.name}` is gone, or means something else, in {imported_versions()}, torch"
            f" {torch.__version__} and torchmetrics {torchmetrics.__version__}: `{function}` in"
            f" lightning_optim/runtime/lightning/{module}.py needs it to {self.purpose}. Install an earlier version of"
            " the package that has changed, or mend the function"
        )


PRIVATE_NAMES = (
    # ---- Lightning: loops ----
    PrivateName("_loaded_from_state_dict", "loops.is_resuming", "go on in the place where a checkpoint was written"),
    PrivateName("_batches_that_stepped", "loops.logger_step", "log values at the step at which Lightning logs"),
    PrivateName("_skip_next_val", "loops.skip_next_validation", "not validate twice after a resume"),
    PrivateName("_result", "loops.keep_result", "report the loss at the weights themselves from a step with two"),
    # ---- Lightning: data ----
    PrivateName("_combined_loader", "data_loading.combined_loader", "find the loaders that a loop reads"),
    PrivateName(
        "_combined_loader_states_to_load", "data_loading.take_saved_positions", "load positions once, on each rank"
    ),
    PrivateName("_data_fetcher", "data_loading.data_fetcher", "start an iterator where a loader was"),
    PrivateName(
        "_last_train_dl_reload_epoch",
        "data_loading.reload_epochs",
        "build loaders in the same epochs after a resume",
    ),
    PrivateName(
        "_last_val_dl_reload_epoch",
        "data_loading.reload_epochs",
        "build loaders in the same epochs after a resume",
    ),
    PrivateName(
        "_seen_batches_per_dataloader", "data_loading.validated_batches", "log validation batches at the same steps"
    ),
    PrivateName("_on_before_batch_transfer", "data_loading.to_device", "convert a batch as Lightning does"),
    PrivateName("_iterator", "data_loading.copy_without_iterator", "read a loader while training reads it"),
    # ---- Lightning: logging ----
    PrivateName("_logger_connector", "logger_connector.connector", "find what a run has logged"),
    PrivateName("_callback_metrics", "logger_connector.shown_metrics", "keep the metrics that callbacks see"),
    PrivateName("_logged_metrics", "logger_connector.shown_metrics", "keep the metrics that loggers have got"),
    PrivateName("_progress_bar_metrics", "logger_connector.shown_metrics", "keep the metrics in the progress bar"),
    PrivateName("_current_fx", "logger_connector.log_position", "go on with values that are half gathered"),
    PrivateName("_first_loop_iter", "logger_connector.log_position", "go on with values that are half gathered"),
    PrivateName("_results", "logger_connector.results", "save what `self.log` has gathered in an epoch"),
    PrivateName("_forward_cache", "logger_connector.last_value", "save the value that was logged last"),
    # ---- Lightning: modules ----
    PrivateName("_current_fx_name", "modules.running_hook", "know the hook that runs, by which values are logged"),
    PrivateName(
        "_compiler_ctx", "modules.is_wrapped_to_compile", "not compile a module again for each rate of dropout"
    ),
    PrivateName("_trainer", "modules.is_attached", "know whether a module is in a Trainer"),
    PrivateName("_device_mesh", "modules.share_device_mesh", "shard the members of an ensemble"),
    PrivateName("_instantiator", "loading.check_names", "refuse a checkpoint that names a function to call"),
    PrivateName("_hparams_name", "modules.hparams_name", "save the hyper-parameters of an ensemble's members"),
    # ---- Lightning: strategies, precision and callbacks ----
    PrivateName("_ddp_kwargs", "strategies.broadcasts_buffers", "know whether each rank has buffers of its own"),
    PrivateName(
        "_save_distributed_checkpoint", "strategies.writes_folders", "know whether checkpoints are folders of shards"
    ),
    PrivateName("_after_closure", "precision.after_gradients", "decay weights just before they are moved"),
    PrivateName("_executor", "strategies.finish_writing", "read checkpoints that are written in the background"),
    PrivateName("_MultiProcessingLauncher", "strategies.launches_processes", "bring attributes back from processes"),
    PrivateName("_make_pruning_permanent", "pruning.is_permanent_in_checkpoints", "save an average as its weights"),
    PrivateName("_prune_on_train_epoch_end", "pruning.prunes_in_validation", "refuse pruning of an average"),
    PrivateName("_use_lottery_ticket_hypothesis", "pruning.resets_weights", "refuse first weights over an average"),
    PrivateName("_every_n_train_steps", "checkpoint_times.step_interval", "say at a start that no resume is exact"),
    PrivateName("_train_time_interval", "checkpoint_times.time_interval", "say at a start that no resume is exact"),
    PrivateName(
        "_should_save_on_train_epoch_end",
        "checkpoint_times.writes_after_validations",
        "say at a start that no resume is exact",
    ),
    # ---- torch ----
    PrivateName("_step_supports_amp_scaling", "precision.unscale_before_hooks", "unscale before hooks read gradients"),
    PrivateName("_per_optimizer_states", "precision.overflow_flags", "keep one loss scale on all ranks"),
    PrivateName("_check_sync_bufs_pre_fwd", "strategies.share_buffers_", "share buffers before weights are swapped"),
    PrivateName("_sync_buffers", "strategies.share_buffers_", "share buffers before weights are swapped"),
    PrivateName("_tensor_name", "pruning.pruned_name", "find the parameters that are pruned"),
    PrivateName("_SpectralNorm", "spectral_norm.parametrization", "estimate singular vectors for averaged weights"),
    PrivateName("_u", "spectral_norm.parametrization", "estimate singular vectors for averaged weights"),
    PrivateName("_v", "spectral_norm.parametrization", "estimate singular vectors for averaged weights"),
    PrivateName("_reshape_weight_to_matrix", "spectral_norm.as_matrix", "estimate singular vectors of a convolution"),
    PrivateName(
        "_unsafe_preserve_version_counter", "torch_internals.keep_versions", "swap weights inside an autograd graph"
    ),
    PrivateName("_assert_async", "torch_internals.assert_in_graph", "compare outputs in an exported program"),
    PrivateName("_C", "torch_internals.is_transformed", "see a transform of `torch.func`, where no value can be read"),
    PrivateName("_compiled_call_impl", "torch_internals.is_compiled", "not have a compiled module compiled again"),
    PrivateName("_dynamo", "torch_internals.uncompiled", "find the module that `torch.compile` wrapped"),
    PrivateName("_functorch", "torch_internals.is_transformed", "see a transform of `torch.func`"),
    PrivateName("_python_dispatch", "torch_internals.is_transformed", "see a mode that traces, as `make_fx` does"),
    PrivateName("_orig_mod", "torch_internals.uncompiled", "find the module that `torch.compile` wrapped"),
    PrivateName("_metadata", "torch_internals.state_metadata", "keep the versions of modules in a state dict"),
    PrivateName("_pytree", "torch_internals.tree_leaves", "walk through outputs of any structure"),
    # ---- torchmetrics ----
    PrivateName("_update_count", "metrics.restore_", "go on with a metric that is half gathered"),
    PrivateName("_plot", "metrics.plot", "plot a metric as torchmetrics plots its own"),
    PrivateName("_computed", "metrics.forget_value_", "forget a value of the state before"),
)
"""Each private name once, by the function that uses it."""


def entry_of(name: str) -> PrivateName:
    """Return the entry of a private name."""
    return next(entry for entry in PRIVATE_NAMES if entry.name == name)


def read_private(owner: Any, name: str) -> Any:
    """Return ``owner.name``.

    Raises:
        RuntimeError: If there is no such attribute; it says what is broken, with the versions, and what to do.
    """
    if not hasattr(owner, name):
        raise RuntimeError(f"{type(owner).__name__} has no such attribute: {entry_of(name).message()}.")
    return getattr(owner, name)


def write_private(owner: Any, name: str, value: Any) -> None:
    """Set ``owner.name``, which must exist already: a renamed attribute would otherwise be set without any effect.

    Raises:
        RuntimeError: If there is no such attribute; it says what is broken, with the versions, and what to do.
    """
    read_private(owner, name)
    setattr(owner, name, value)
