"""Calls of a module's own code beside training, of which nothing remains: not in the module, nor in the Trainer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_optim.runtime.lightning import LightningModule, Logger, Trainer, _ResultCollection, rank_zero_warn
from lightning_optim.runtime.lightning.log_interception import intercept_log
from lightning_optim.runtime.object_state import ObjectState
from lightning_optim.runtime.patching import patched


class Isolated:
    """Calls pieces of the user's code, and puts back after each call what it changed in the module.

    Attributes:
        remains: The names of what changed and cannot be put back.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        self._state: ObjectState | None = None
        self.remains: list[str] = []

    def call(self, run: Callable[[Any], Any], batch: Any) -> None:
        """Call ``run(batch)``, and undo its changes to the batch too: a call that failed is tried in another way."""
        if self._state is None:  # not earlier: the caller may have changed the module for the length of all calls
            self._state = ObjectState({"self": self._module})
            self._state.set_gradients_aside()
        given = ObjectState({"batch": [batch]})
        given.set_gradients_aside()
        self._state.watch()
        try:
            run(batch)
        except BaseException:
            _abort(self._module)
            raise
        finally:
            given.restore_()
            given.return_gradients()
            self.remains += [name for name in self._state.restore_() if name not in self.remains]

    def close(self) -> None:
        """Give back the gradients."""
        if self._state is not None:
            self._state.return_gradients()


def _abort(module: nn.Module) -> None:
    """Let FSDP2 forget a forward pass that an error cut short: it would take the next one for a part of it."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule) and hasattr(submodule, "reset_iter_state"):
            with contextlib.suppress(RuntimeError):  # it is for roots only, and says so
                submodule.reset_iter_state()


@contextlib.contextmanager
def isolated(trainer: Trainer, pl_module: LightningModule) -> Iterator[Isolated]:
    """Context manager: a training step can be called, as if in training, and nothing of it is logged.

    Calls of ``self.log``, ``self.logger`` and ``self.print`` are dropped. A step that asks the Trainer finds it
    training. Afterwards the module and the Trainer are as before, and what else changed is named in a warning.
    """
    calls = Isolated(pl_module)
    with contextlib.ExitStack() as stack:
        for module in pl_module.modules():
            if isinstance(module, LightningModule):
                stack.enter_context(intercept_log(module, _ignore))
                stack.enter_context(patched(module, "print", _ignore))
        stack.enter_context(_unheard(trainer))
        stack.callback(calls.close)
        yield calls
    if calls.remains:
        rank_zero_warn(
            f"The call of {type(pl_module).__name__} that estimates BatchNorm statistics changed"
            f" {', '.join(sorted(calls.remains))}, which cannot be put back, so that training goes on with the change."
            " Override `forward_batch`, to run only what the statistics need."
        )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what is logged or printed, and do nothing."""


@contextlib.contextmanager
def _unheard(trainer: Trainer) -> Iterator[None]:
    """Let the Trainer be in training, with silent loggers, and put back what a step may have set there."""
    connector, epoch_loop, module = trainer._logger_connector, trainer.fit_loop.epoch_loop, trainer.lightning_module
    stage, hook, stops, loggers = trainer.state.stage, module._current_fx_name, trainer.should_stop, trainer.loggers
    kept = {
        name: copy.copy(getattr(connector, name))
        for name in (
            "_callback_metrics",
            "_logged_metrics",
            "_progress_bar_metrics",
            "_current_fx",
            "_first_loop_iter",
        )
    }
    trainer.training = True
    module._current_fx_name = "training_step"
    trainer.loggers = [_SilentLogger(logger) for logger in loggers]
    # For who calls Lightning's own `log` past the module's.
    with patched(epoch_loop, "_results", _ResultCollection(training=True)):
        try:
            yield
        finally:
            trainer.state.stage, trainer.should_stop, trainer.loggers = stage, stops, loggers
            module._current_fx_name = hook
            for name, value in kept.items():
                setattr(connector, name, value)


class _Silent:
    """Stands for an object to which a step sends what it logs: takes every call, and does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Silent:
        return self

    def __getattr__(self, name: str) -> _Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> _Silent:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _SilentLogger(_Silent):
    """Stands for a logger: of its class, with its name and folders, and silent."""

    def __init__(self, logger: Logger) -> None:
        object.__setattr__(self, "_logger", logger)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        if name == "experiment" or name.startswith("_"):  # the first begins a run where there is none yet
            return super().__getattr__(name)
        value = getattr(self._logger, name)
        return (
            value if value is None or isinstance(value, str | int | float | dict | list) else super().__getattr__(name)
        )
