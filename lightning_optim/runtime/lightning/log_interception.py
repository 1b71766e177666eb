"""Mute, listen to or collect the values that a module logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import LightningModule

from lightning_optim.runtime.patching import patched


@contextlib.contextmanager
def intercept_log(pl_module: LightningModule, handler: Callable[..., Any]) -> Iterator[None]:
    """Context manager: ``pl_module.log(…)`` calls ``handler(…)``, and ``log_dict`` calls it once for each entry.

    Args:
        pl_module: The module. What it holds of other LightningModules keeps its own ``log``.
        handler: Gets what ``log`` was called with: the name, the value, and options.

    Example::

        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module, logged = BoringModel(), []
        >>> with intercept_log(module, lambda name, value, **options: logged.append((name, value))):
        ...     module.log("loss", 1.0, prog_bar=True)
        ...     module.log_dict({"a": 2.0, "b": 3.0})
        >>> logged
        [('loss', 1.0), ('a', 2.0), ('b', 3.0)]
    """
    with patched(pl_module, "log", handler):
        yield
