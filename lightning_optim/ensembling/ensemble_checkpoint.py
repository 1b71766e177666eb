"""Save the members of an ensemble in one checkpoint, and build them from it.

The ensemble's ``state_dict`` holds the members' weights under ``members.0.…``, ``members.1.…``. The entry
``"ensemble"`` holds the ensemble's own arguments and, for each member, the name of its class and the content of its own
checkpoint beside the weights: hyper-parameters, and what its ``on_save_checkpoint`` adds.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_optim.ensembling.file_entries import ENSEMBLE_KEY, ensemble_entry
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.lightning import LightningModule
from lightning_optim.runtime.lightning.loading import check_names, is_safe, load_from_checkpoint
from lightning_optim.runtime.lightning.modules import HPARAMS, HPARAMS_NAME, HPARAMS_TYPE, hparams_name

_PREFIX = "members."


class IncompatibleKeys(NamedTuple):
    """Return value of ``load_state_dict``, as torch's: the names that are missing, and those that were not expected."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(members: nn.ModuleList, state: Mapping[str, Any], strict: bool, assign: bool) -> IncompatibleKeys:
    """Let each member load its own weights.

    Raises:
        RuntimeError: If a weight has another shape; with ``strict``, also if one is missing or unexpected.
    """
    parts = [_part_of(state, index) for index in range(len(members))]
    known = _join(parts)
    unexpected = [name for name in state if name not in known]
    if strict and unexpected:
        raise RuntimeError(
            f"The state dict has names that this ensemble of {len(members)} members does not have, {len(unexpected)} in"
            f" all: {unexpected[:3]}. Load it into an ensemble of the same members, or pass `strict=False`."
        )
    keys = IncompatibleKeys([], unexpected)
    for index, (member, part) in enumerate(zip(members, parts, strict=True)):
        try:
            # A member that saves a part of its weights has `strict_loading = False`; the other members keep theirs.
            is_strict = strict and bool(member.strict_loading)
            found = member.load_state_dict(part, strict=is_strict, **({"assign": True} if assign else {}))
        except RuntimeError as error:
            raise RuntimeError(f"Member {index}: {error}") from error
        for all_names, names in zip(keys, found or ([], []), strict=True):
            all_names += [f"{_PREFIX}{index}.{name}" for name in names]
    return keys


def save_members(members: nn.ModuleList, arguments: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Add the content of each member's own checkpoint to a checkpoint of the ensemble.

    Args:
        members: The members.
        arguments: The ensemble's own arguments, beside ``members``.
        checkpoint: The checkpoint that Lightning is about to write.
    """
    parts = []
    member: Any
    for index, member in enumerate(members):
        parts.append(_with_hyper_parameters(member, _checkpoint_of(checkpoint, index)))
        member.on_save_checkpoint(parts[-1])
    if "state_dict" in checkpoint:
        checkpoint["state_dict"] = _join([part.pop("state_dict") for part in parts])
    classes = [f"{type(member).__module__}:{type(member).__qualname__}" for member in members]
    own = [{key: value for key, value in part.items() if value is not checkpoint.get(key)} for part in parts]
    written = [{"class": name, "checkpoint": part} for name, part in zip(classes, own, strict=True)]
    checkpoint[ENSEMBLE_KEY] = {**arguments, "members": written}


def load_members(members: nn.ModuleList, checkpoint: dict[str, Any]) -> None:
    """Call each member's ``on_load_checkpoint`` with its own checkpoint, which it may change."""
    parts = [_checkpoint_of(checkpoint, index) for index in range(len(members))]
    member: Any
    for member, part in zip(members, parts, strict=True):
        member.on_load_checkpoint(part)
    if "state_dict" in checkpoint:
        own = _join([part["state_dict"] for part in parts])
        # The rest belongs to members that this ensemble does not have: loading the weights reports it.
        known = _join([_part_of(checkpoint["state_dict"], index) for index in range(len(members))])
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n not in known} | own


def read(path: Any, weights_only: bool) -> dict[str, Any]:
    """Read a checkpoint into memory, on the CPU.

    Raises:
        ValueError: If it is damaged, not a checkpoint of Lightning, or holds more than tensors and plain values with
            ``weights_only``.
    """
    if isinstance(path, str | os.PathLike):
        _refuse_folder(path)
        loaded = safe_reading.load(path, weights_only)
    else:  # an open file
        loaded = torch.load(path, map_location="cpu", weights_only=weights_only)
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no `state_dict` with named weights.")
    return dict(loaded)


def arguments_in(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the ensemble that wrote the checkpoint; empty if no ensemble wrote it."""
    written = ensemble_entry(checkpoint)
    return {} if written is None else {name: written.get(name) for name in ("outputs", "on", "dim")}


def classes_in(path: Any, checkpoint: dict[str, Any], given: Any, weights_only: bool) -> list[type[LightningModule]]:
    """Return the members' classes: those that are given, or those that the checkpoint names if it is trusted.

    Raises:
        ValueError: If no ensemble wrote the checkpoint, it is not trusted, or a class that it names cannot be imported.
    """
    written = ensemble_entry(checkpoint)
    if written is None:
        raise ValueError(
            f"{path} is no checkpoint of an Ensemble: use `Ensemble.from_checkpoints` for members in checkpoints of"
            " their own; if an older version wrote it, pass `members=` and `outputs=`."
        )
    names = [entry["class"] for entry in written["members"]]
    if given is not None:
        classes = list(given) if isinstance(given, Sequence) else [given] * len(names)
        if len(classes) != len(names) or not all(map(_is_module_class, classes)):
            raise ValueError(
                f"`member_class` must be a LightningModule class, or a list with one for each of {len(names)} members,"
                f" got {given!r}"
            )
        return classes
    if weights_only:
        raise ValueError(
            f"{path} names its members' classes, {sorted(set(names))}, and nothing that a checkpoint names is called:"
            " pass `member_class=`, or `weights_only=False` if you trust the file."
        )
    return [_import_class(path, name) for name in names]


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, LightningModule)


def _import_class(path: Any, name: str) -> type[LightningModule]:
    module, _, qualified = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path}: the members' class {name!r} is not found ({error}): pass `member_class=`") from error
    if not _is_module_class(found):
        raise ValueError(f"{path}: the members' class {name!r} is no LightningModule: pass `member_class=`")
    return found


def build_members(path: Any, checkpoint: dict[str, Any], classes: list[type[LightningModule]], kwargs: Any) -> Any:
    """Build the members that a checkpoint holds, each with the ``load_from_checkpoint`` of its own class."""
    members = []
    for index, member_class in enumerate(classes):
        content = _checkpoint_of(checkpoint, index)
        if kwargs["weights_only"]:
            check_names(member_class, path, content)
        with tempfile.TemporaryDirectory() as folder:
            # A file with a path, and no file object: a class may read it twice, or ask for its name.
            part = os.path.join(folder, f"member-{index}.ckpt")
            torch.save(content, part)
            try:
                members.append(load_from_checkpoint(member_class, part, kwargs))
            except TypeError as error:
                raise ValueError(
                    f"{path}: member {index}, a {member_class.__name__}, cannot be built from the saved"
                    f" hyper-parameters ({error}): pass its arguments here as keywords, or the members themselves,"
                    " `members=[…]`."
                ) from error
    return members


def load_member(member_class: type[LightningModule], path: str | Path, kwargs: dict[str, Any]) -> LightningModule:
    """Load the model in a checkpoint. Objects other than tensors and plain values need ``weights_only=False``.

    Raises:
        ValueError: If the checkpoint is damaged, not one of Lightning, or holds such objects.
        RuntimeError: If its weights do not fit the class.
        TypeError: If the class has arguments that the checkpoint does not hold.
    """
    arguments: dict[str, Any] = {**kwargs, "weights_only": kwargs.get("weights_only") is not False}
    is_local = os.path.exists(path)
    if arguments["weights_only"] and (is_local or not is_safe(member_class)):
        check_names(member_class, path, read(path, weights_only=True))
    elif is_local:
        _refuse_folder(path)
        safe_reading.check(path, weights_only=False)
    try:
        return load_from_checkpoint(member_class, path, arguments)
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _refuse_folder(path: str | os.PathLike[str]) -> None:
    if os.path.isdir(path):
        raise ValueError(
            f"{path} is a folder, a distributed checkpoint, which Lightning loads only through a Trainer's `ckpt_path`:"
            " convert it to a file with `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )


# ---- one member's part ----------------------------------------------------------------------------------------------


def _part_of(state: Mapping[str, Any], index: int) -> dict[str, Any]:
    prefix = f"{_PREFIX}{index}."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _join(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{_PREFIX}{index}.{name}": value for index, part in enumerate(parts) for name, value in part.items()}


def _checkpoint_of(checkpoint: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the checkpoint of one member. The hyper-parameters of the whole checkpoint are the first member's."""
    written = ensemble_entry(checkpoint)
    part = {key: value for key, value in checkpoint.items() if key != ENSEMBLE_KEY}
    if written is not None and index < len(written["members"]):
        part = _without_hyper_parameters(part) | written["members"][index]["checkpoint"]
    if "state_dict" in checkpoint:
        part["state_dict"] = _part_of(checkpoint["state_dict"], index)
    return part


def _with_hyper_parameters(member: LightningModule, part: dict[str, Any]) -> dict[str, Any]:
    """Add the hyper-parameters that Lightning writes into a checkpoint of this member."""
    part = _without_hyper_parameters(part)
    if not member.hparams:
        return part
    part[HPARAMS] = dict(member.hparams) if isinstance(member.hparams, dict) else member.hparams
    part |= hparams_name(member)
    if not isinstance(member.hparams, dict):
        part[HPARAMS_TYPE] = type(member.hparams)
    return part


def _without_hyper_parameters(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in (HPARAMS, HPARAMS_NAME, HPARAMS_TYPE)}
