"""Mute, tap or collect the values that the steps of a module log."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.lightning.data_loading import batch_size_of
from lightning_optim.runtime.lightning.logger_connector import results_of_loop
from lightning_optim.runtime.lightning.modules import running_hook
from lightning_optim.runtime.lightning.packages import of_same_package
from lightning_optim.runtime.patching import patched


@dataclass(frozen=True)
class LoggedValue:
    """Hold one value that a hook of a module logs, before Lightning has it.

    Attributes:
        name: Name that was given to ``log``.
        value: A number, a tensor, perhaps with a graph, or a metric of torchmetrics; of this rank alone.
        options: Other arguments of ``log``, by name, such as ``on_step`` and ``sync_dist``.
        module: The module whose ``log`` was called.
        forward: Function that logs the value as Lightning does.
    """

    name: str
    value: Any
    options: dict[str, Any]
    module: LightningModule
    forward: Callable[[], None]

    @property
    def hook(self) -> str | None:
        """Name of the hook that logs, such as ``"validation_step"``."""
        return running_hook(self.module)

    @property
    def dataloader_idx(self) -> int | None:
        """Index of the loader whose batch is evaluated; ``None`` in training, or if there is one loader."""
        return None if self._results is None else self._results.dataloader_idx

    @property
    def key(self) -> str:
        """Name in ``trainer.callback_metrics``: with several loaders it ends in ``/dataloader_idx_<n>``."""
        index = self.dataloader_idx if self.options.get("add_dataloader_idx", True) else None
        return self.name if index is None else self.name + self._results.DATALOADER_SUFFIX.format(index)

    @property
    def batch_size(self) -> int:
        """Number of samples by which Lightning weights the value in a mean over batches: given, or read off the batch.

        It is 1 in a hook that has no batch.
        """
        results, given = self._results, self.options.get("batch_size")
        if given is not None or results is None or results.batch is None:
            return 1 if given is None else int(given)
        if results.batch_size is None:
            results.batch_size = batch_size_of(results.batch)  # once a batch, as Lightning does
        return results.batch_size

    @property
    def _results(self) -> Any:
        return results_of_loop(self.module.trainer)


@contextlib.contextmanager
def intercept_log(pl_module: LightningModule, handler: Callable[[LoggedValue], Any] | None = None) -> Iterator[None]:
    """Context manager: each value that the module logs goes to ``handler`` in the place of Lightning.

    Values of ``log_dict`` come one by one, and those of LightningModules inside the module come too. To *mute* the
    module give no handler; to *collect* what it logs, keep the values; to *tap* it, call ``logged.forward()`` as well.
    Callbacks log past it. Under DDP each rank's handler gets the values of this rank.

    Args:
        pl_module: The module. A ``log`` that its class overrides is not called, but by ``forward``.
        handler: Takes each value. Default: values are dropped.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, collected = BoringModel(), {}
        >>> with intercept_log(module, lambda logged: collected.update({logged.name: logged.value})):
        ...     module.log("loss", 1.0, prog_bar=True)
        ...     module.log_dict({"a": 2.0, "b": 3.0})
        >>> collected
        {'loss': 1.0, 'a': 2.0, 'b': 3.0}
    """
    with contextlib.ExitStack() as stack:
        for module in pl_module.modules():
            if isinstance(module, LightningModule):
                log = _drop if handler is None else _handing(module, handler)
                stack.enter_context(patched(module, "log", log))
        yield


def _drop(*args: Any, **options: Any) -> None:
    """Drop a value. One function for all modules: a compiled step would be compiled again for each new one."""


def _handing(module: LightningModule, handler: Callable[[LoggedValue], Any]) -> Callable[..., None]:
    log = module.log
    options_in_order = _options_of(of_same_package(module, "LightningModule"))

    @functools.wraps(log)
    def hand(name: str, value: Any, *args: Any, **options: Any) -> None:
        forward = functools.partial(log, name, value, *args, **options)
        by_name = {**dict(zip(options_in_order, args, strict=False)), **options}
        handler(LoggedValue(name, value, by_name, module, forward))

    return hand


@functools.cache
def _options_of(module_class: type[LightningModule]) -> list[str]:
    """Return the names of ``log``'s arguments after the module, the name and the value, in their order."""
    return list(inspect.signature(module_class.log).parameters)[3:]
