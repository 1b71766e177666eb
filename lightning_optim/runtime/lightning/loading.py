"""Load a module from a checkpoint with any version of Lightning, and run no code that the checkpoint names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.lightning.modules import HPARAMS
from lightning_optim.runtime.lightning.packages import version_of

_CALLED = "_instantiator"
"""Hyper-parameter with the name of a function that Lightning calls to make the module: LightningCLI writes it."""

_CHECKS_NAMES = (2, 6, 6)
"""First version of Lightning that calls no other function, and imports no class, that a checkpoint names."""


def is_safe(kind: type[LightningModule]) -> bool:
    """Return True if ``load_from_checkpoint(…, weights_only=True)`` of a class runs no code that a checkpoint names.

    Lightning before 2.6 does not know ``weights_only`` and unpickles any object; one before 2.6.6 calls a function that
    the hyper-parameters name.
    """
    return _takes_weights_only(kind) and version_of(kind) >= _CHECKS_NAMES


def load_from_checkpoint(kind: type[LightningModule], file: Any, arguments: Mapping[str, Any]) -> LightningModule:
    """Call a class's ``load_from_checkpoint``, without ``weights_only`` if it does not take that."""
    known = dict(arguments)
    if not _takes_weights_only(kind):
        known.pop("weights_only", None)
    return kind.load_from_checkpoint(file, **known)


def check_names(kind: type[LightningModule], path: Any, checkpoint: Mapping[str, Any]) -> None:
    """Raise if loading this checkpoint would call a function that it names, or import a class.

    Args:
        kind: The class whose ``load_from_checkpoint`` will read it.
        path: Where it lies, for the message.
        checkpoint: Its content.

    Raises:
        ValueError: If it names one, and this version of Lightning does not check the name itself.
    """
    if version_of(kind) >= _CHECKS_NAMES:
        return
    for key in (HPARAMS, "hparams", "module_arguments"):  # the last two are names of earlier versions, still read
        saved = checkpoint.get(key)
        if isinstance(saved, Mapping) and _CALLED in saved:
            raise ValueError(
                f"{path} names a function, {saved[_CALLED]!r}, and Lightning before 2.6.6 calls whatever a checkpoint"
                " names: install Lightning 2.6.6 or later, or pass `weights_only=False` if you trust the checkpoint."
            )


def _takes_weights_only(kind: type[LightningModule]) -> bool:
    return "weights_only" in inspect.signature(kind.load_from_checkpoint).parameters
