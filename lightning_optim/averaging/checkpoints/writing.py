"""Write averaged weights as a checkpoint like one of those that they were made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.provenance import KEY, Provenance, with_provenance
from lightning_optim.averaging.checkpoints.safetensors_writing import save_safetensors
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.lightning.torch_internals import tree_leaves

# Entries that belong to the training of one checkpoint, not to the mean of several.
_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "loops", "current_model_state", "averaging_state")


def check_ending(path: str | os.PathLike[str]) -> str:
    """Return the path as text, or raise if no checkpoint has its ending.

    Raises:
        ValueError: If the path ends otherwise than in ``.ckpt``, ``.pt``, ``.pth`` or ``.safetensors``.
    """
    path = os.fspath(path)
    if not path.endswith(reading.ENDINGS):
        *endings, last = reading.ENDINGS
        raise ValueError(f"{path} must end in {', '.join(endings)} or {last}, which chooses the format")
    return path


def write_average(
    weights: Mapping[Any, Any],
    path: str,
    provenance: Provenance,
    like: str,
    key: str | None = None,
    weights_only: bool = True,
) -> list[str]:
    """Write averaged weights to ``path``, and return the names of entries of ``like`` that are left out.

    A Lightning checkpoint loses its training state: ``load_from_checkpoint`` finds the arguments of the module, and
    nothing that belongs to one checkpoint alone. Other files lose all other entries with tensors, such as the state of
    an optimizer. A ``.safetensors`` file has the weights alone.

    Args:
        weights: The averaged weights.
        path: The file to write, which appears when it is complete.
        provenance: Of which checkpoints they are the mean.
        like: The checkpoint in which they replace the weights.
        key: Name of the weights in it.
        weights_only: If True, read only tensors and plain values from ``like``.

    Raises:
        ValueError: If the weights cannot be written in this format.
        OSError: If a file cannot be read or written.
    """
    if safe_reading.is_safetensors(path):
        save_safetensors(weights, path, provenance.as_plain_values())
        return []
    content, left_out = _content(weights, provenance, like, key, weights_only)
    with write_atomically(path) as beside, open(beside, "wb") as file:
        torch.save(content, file)
    return left_out


def _content(
    weights: Mapping[Any, Any], provenance: Provenance, like: str, key: str | None, weights_only: bool
) -> tuple[Mapping[Any, Any], list[str]]:
    loaded = {} if safe_reading.is_safetensors(like) else reading.load_checkpoint(like, weights_only)
    is_lightning = "pytorch-lightning_version" in loaded
    is_folder = os.path.isdir(like)
    where = (key or reading.STATE_DICT) if is_folder else reading.weights_key(loaded, like, key)
    if where is None or (is_folder and not is_lightning):
        return with_provenance(weights, provenance), []
    kept: dict[Any, Any] = {}
    left_out = []
    for name, value in loaded.items():
        if name == where:
            kept[name] = weights
        elif is_lightning and name in _TRAINING:
            continue
        elif (not is_lightning or where != reading.STATE_DICT) and _has_tensors(value):
            left_out.append(str(name))
        else:
            kept[name] = value
    return {**kept, where: weights, KEY: provenance.as_plain_values()}, left_out


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))
