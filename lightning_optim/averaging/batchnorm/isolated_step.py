"""Call a module's ``training_step`` outside of training, and undo what it changed in the module and the Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning_optim.runtime.lightning import LightningModule, Logger, Trainer, logger_connector, rank_zero_warn
from lightning_optim.runtime.lightning.log_interception import intercept_log
from lightning_optim.runtime.lightning.modules import set_running_hook
from lightning_optim.runtime.lightning.strategies import forget_forward
from lightning_optim.runtime.object_state import ObjectState
from lightning_optim.runtime.patching import patched


class IsolatedCalls:
    """Call functions of the user, and restore the module after each call.

    Attributes:
        not_restored: Names of what changed and cannot be restored.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        self._state: ObjectState | None = None
        self.not_restored: list[str] = []

    def call(self, run: Callable[[Any], Any], batch: Any) -> None:
        """Call ``run(batch)``; restore the module and the batch, since a call that fails is repeated with gradients."""
        if self._state is None:  # not earlier, since the caller may change the module for the length of all calls
            self._state = ObjectState({"self": self._module})
            self._state.set_gradients_aside()
        given = ObjectState({"batch": [batch]})
        given.set_gradients_aside()
        self._state.watch()
        try:
            run(batch)
        except BaseException:
            forget_forward(self._module)
            raise
        finally:
            given.restore_()
            given.return_gradients()
            self.not_restored += [name for name in self._state.restore_() if name not in self.not_restored]

    def close(self) -> None:
        """Give the parameters their gradients again."""
        if self._state is not None:
            self._state.return_gradients()


@contextlib.contextmanager
def isolated(trainer: Trainer, pl_module: LightningModule) -> Iterator[IsolatedCalls]:
    """Context manager: ``training_step`` can be called as in training, and logs nothing.

    Calls of ``self.log``, ``self.logger`` and ``self.print`` do nothing, and ``trainer.training`` is true. Afterwards
    the module and the Trainer are as before; a warning names what could not be restored.
    """
    calls = IsolatedCalls(pl_module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(intercept_log(pl_module))
        for module in pl_module.modules():
            if isinstance(module, LightningModule):
                stack.enter_context(patched(module, "print", _ignore))
        stack.enter_context(_trainer_in_training(trainer))
        stack.callback(calls.close)
        yield calls
    if calls.not_restored:
        rank_zero_warn(
            f"The call of {type(pl_module).__name__} that estimates BatchNorm statistics changed"
            f" {', '.join(sorted(calls.not_restored))}, which cannot be restored: training goes on with the change."
            " Override `forward_batch` with a forward pass, to run only what the statistics need."
        )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Print nothing."""


@contextlib.contextmanager
def _trainer_in_training(trainer: Trainer) -> Iterator[None]:
    """Context manager: the Trainer is in training, with silent loggers; afterwards it is as before."""
    stage, stops, loggers = trainer.state.stage, trainer.should_stop, trainer.loggers
    # Calls of Lightning's own `log` that bypass the patched one go nowhere.
    with logger_connector.keep_logging_state(trainer), logger_connector.logging_nowhere(trainer):
        trainer.training = True
        set_running_hook(trainer.lightning_module, "training_step")
        trainer.loggers = [_SilentLogger(logger) for logger in loggers]
        try:
            yield
        finally:
            trainer.state.stage, trainer.should_stop, trainer.loggers = stage, stops, loggers


class _Silent:
    """Replace an object that a step logs to, such as an experiment: accept every call, and do nothing."""

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
    """Replace a logger: have its class, name and folders, and log nothing."""

    def __init__(self, logger: Logger) -> None:
        object.__setattr__(self, "_logger", logger)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        if name == "experiment" or name.startswith("_"):  # `experiment` starts a run where there is none
            return super().__getattr__(name)
        value = getattr(self._logger, name)
        return (
            value if value is None or isinstance(value, str | int | float | dict | list) else super().__getattr__(name)
        )
