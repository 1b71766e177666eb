"""Save and load callback state with tensors that differ between ranks: shards, and buffers of each rank.

Lightning stores callback state from rank 0 only. A shard that is returned from ``state_dict`` would come back on every
rank, with shapes that agree and values that are wrong. So shards are gathered for a single file, and are an entry of
the folder of a distributed checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim.base import module_tensors, shards
from lightning_optim.runtime.lightning import LightningModule, Strategy, Trainer
from lightning_optim.runtime.lightning.strategies import writes_folders
from lightning_optim.runtime.lightning.torch_internals import tree_map_only
from lightning_optim.runtime.patching import patched

_ENTRY = "lightning_optim"
_RANKS = "of_each_rank"  # key in a callback's state: for each rank the tensors in which ranks differ
_SHARD = "sharded_dtype"  # key of a leaf that refers to a tensor in the folder


def export(tree: dict[str, Any], trainer: Trainer | None) -> dict[str, Any]:
    """Copy a state as rank 0 may store it: DTensors are gathered, or replaced by their dtype in a folder."""
    folder = trainer is not None and writes_folders(trainer.strategy)

    def stored(tensor: DTensor) -> Any:
        return {_SHARD: str(tensor.dtype).removeprefix("torch.")} if folder else shards.gather_to_cpu(tensor)

    return tree_map_only(DTensor, stored, tree)


def save_shards(tree: Callable[[], dict[str, Any]], trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
    """Add the DTensors of ``tree()`` to a distributed checkpoint.

    Lightning writes ``checkpoint["optimizer_states"]`` shard by shard into the folder, under ``optimizer_0``,
    ``optimizer_1``, …: this is one more entry. A Trainer without callbacks of this package reads its own entries only.
    """
    if not writes_folders(trainer.strategy) or "optimizer_states" not in checkpoint:
        return
    sharded = {_entry(path): value for path, value in _leaves(tree()) if isinstance(value, DTensor)}
    if sharded:
        states = checkpoint["optimizer_states"]
        if not (states and _ENTRY in states[-1]):
            states.append({_ENTRY: {}})
        states[-1][_ENTRY][key] = sharded


def load_shards(trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any], key: str) -> None:
    """Put the DTensors of a distributed checkpoint into ``checkpoint["callbacks"][key]``, in place of their dtypes.

    The last part of a tensor's path is its name in the model, which says how it is sharded now.
    """
    state = checkpoint.get("callbacks", {}).get(key)
    noted = {path[:-1]: getattr(torch, dtype) for path, dtype in _leaves(state or {}) if path[-1] == _SHARD}
    if not noted:
        return
    shards.reshard_(pl_module)
    live = {
        module_tensors.plain_name(name): tensor.detach()
        for name, tensor in module_tensors.named_tensors(pl_module).items()
    }
    found = {
        _entry(path): torch.empty_like(live[module_tensors.plain_name(path[-1])], dtype=dtype)
        for path, dtype in noted.items()
    }
    entry = f"optimizer_{len(trainer.optimizers)}"
    dcp.load({entry: {_ENTRY: {key: found}}}, checkpoint_id=str(trainer.ckpt_path))
    for *parents, name in noted:
        functools.reduce(operator.getitem, parents, state)[name] = found[_entry((*parents, name))]


def save_ranks(ours: dict[str, Tensor], trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
    """Add the tensors in which ranks differ to a callback's state in a checkpoint: a dictionary for each rank.

    Call it on all ranks. Tensors that are equal on all ranks are not gathered.

    Args:
        ours: Plain tensors that this rank holds, by their paths in the state.
        trainer: The Trainer.
        checkpoint: The checkpoint that is about to be written.
        key: The callback's.
    """
    if trainer.world_size == 1:
        return
    digests = from_each_rank({path: digest(tensor) for path, tensor in ours.items()}, trainer.world_size)
    paths = {path for theirs in digests for path in theirs if any(theirs[path] != each.get(path) for each in digests)}
    if not paths:
        return
    everyone: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    dist.gather_object({path: tensor.detach().cpu() for path, tensor in ours.items() if path in paths}, everyone)
    if everyone is not None:
        checkpoint["callbacks"].setdefault(key, {})[_RANKS] = everyone


def load_ranks(trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
    """Put this rank's tensors into the callback's state; with another number of ranks, the mean over ranks."""
    state = checkpoint.get("callbacks", {}).get(key)
    by_rank = state.pop(_RANKS, None) if isinstance(state, dict) else None
    if not by_rank:
        return
    same = len(by_rank) == trainer.world_size
    for path, tensor in by_rank[trainer.global_rank if same else 0].items():
        tree, name = _place_of(state, path)
        found = [theirs[path] for theirs in by_rank if path in theirs and theirs[path].shape == tensor.shape]
        tree[name] = tensor if same else torch.stack([each.double() for each in found]).mean(0).to(tensor.dtype)


def from_each_rank(value: Any, world_size: int) -> list[Any]:
    """Return the value of each rank, in their order: a collective. Without a process group, that of this rank alone."""
    if world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def digest(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Return dtype, shape and a hash of a plain tensor's bits: equal for tensors that are equal bit for bit."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return str(tensor.dtype), tuple(tensor.shape), hashlib.blake2b(data, digest_size=16).digest()


def leave_out(
    strategy: Strategy,
    module: nn.Module,
    key: str,
    parts: Sequence[str],
    tell: Callable[[set[str]], None] | None = None,
) -> None:
    """Leave out of the next checkpoint's callback state the frozen tensors that its ``state_dict`` leaves out.

    Call it in ``on_save_checkpoint``. The module's own hook, in which it may leave weights out, comes after those of
    callbacks: only when the strategy writes the checkpoint is it known what was left out.

    Args:
        strategy: The Trainer's.
        module: The module whose checkpoint it is.
        key: The callback's ``state_key``.
        parts: Keys of its state, each with a dictionary of name to tensor.
        tell: Called with the plain names of these tensors, if there are any.
    """

    def edit(checkpoint: dict[str, Any]) -> None:
        saved = {module_tensors.plain_name(name) for name in checkpoint.get("state_dict", {})}
        # Only rank 0 has the gathered weights of a sharded model.
        if names := module_tensors.frozen_names(module) - saved if saved else set():
            _drop(checkpoint, key, parts, names)
            if tell is not None:
                tell(names)

    edit_before_write(strategy, edit)


def edit_before_write(strategy: Strategy, edit: Callable[[dict[str, Any]], None]) -> None:
    """Call ``edit`` with the next checkpoint, once, when the strategy is about to write it.

    Every ``on_save_checkpoint`` has run then; the module's own comes after those of callbacks.
    """
    save, back = strategy.save_checkpoint, contextlib.ExitStack()

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        back.close()
        edit(checkpoint)
        save(checkpoint, *args, **kwargs)

    back.enter_context(patched(strategy, "save_checkpoint", save_checkpoint))


def _drop(checkpoint: dict[str, Any], key: str, parts: Sequence[str], names: set[str]) -> None:
    held = checkpoint.get("callbacks", {}).get(key, {})
    for part in held.keys() & set(parts):
        held[part] = {name: value for name, value in held[part].items() if module_tensors.plain_name(name) not in names}
    states = checkpoint.get("optimizer_states")
    shards = states[-1].get(_ENTRY, {}).get(key, {}) if states else {}
    for path in list(shards):
        _, part, *name = path.split("/", 2)
        if part in parts and module_tensors.plain_name("".join(name)) in names:
            del shards[path]


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and the value of every leaf of nested dictionaries and lists."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, (*path, name))
    else:
        yield path, tree


def _entry(path: tuple[Any, ...]) -> str:
    """Return the name of a leaf in the folder of a distributed checkpoint."""
    return "".join(f"/{name}" for name in path)


def _place_of(state: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary of ``state`` to which a path leads, and its key there: a tensor's name may have slashes."""
    parent, name = path.split("/", 1) if "/" in path else ("", path)
    tree = state.setdefault(parent, {}) if parent else state
    while "/" in name and name not in tree and isinstance(tree.get(name.split("/", 1)[0]), dict):
        parent, name = name.split("/", 1)
        tree = tree[parent]
    return tree, name
