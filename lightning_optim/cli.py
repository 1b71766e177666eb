"""The command line: ``lightning-optim average`` and ``lightning-optim inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import average_checkpoints
from lightning_optim.averaging.checkpoints.inspecting import describe
from lightning_optim.averaging.checkpoints.safetensors_writing import save_safetensors
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.lightning.torch_internals import tree_leaves

# What belongs to the training of one of the files, and not to their mean.
_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "loops", "current_model_state", "averaging_state")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except Exception as error:  # of any kind: of files with contents that nobody thought of
        said = str(error) if isinstance(error, OSError | ValueError | ImportError) else safe_reading.first_line(error)
    paths = [*given.files, *([given.output] if "output" in given else [])]
    if not any(path in said for path in paths):
        said = f"{', '.join(given.files)}: {said}"
    print(f"lightning-optim: {_on_one_line(said)}", file=sys.stderr)
    return 1


def _on_one_line(text: str) -> str:
    """Escape line breaks and control characters, which a file may have put into its names."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-optim", description="Weights in checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="command")

    average = commands.add_parser("average", help="write the weighted mean of several files' weights")
    average.add_argument("files", nargs="+", help="checkpoints, state dicts, .safetensors files, or folders")
    average.add_argument("-o", "--output", required=True, help="a .ckpt or .safetensors file")
    average.add_argument("--weights", nargs="+", type=float, help="one number for each file; default: equal")
    average.add_argument("--force", action="store_true", help="overwrite the output")
    average.set_defaults(run=_average)

    inspect = commands.add_parser("inspect", help="say what is in a checkpoint: raw or averaged, how many updates")
    inspect.add_argument("files", nargs="+", metavar="file")
    inspect.set_defaults(run=_inspect)

    for command in (average, inspect):
        command.add_argument(
            "--key",
            help="under which name the weights lie; default: state_dict, model, model_state_dict, ema, or the file",
        )
        command.add_argument(
            "--unsafe",
            action="store_true",
            help="read pickled objects too, which can run any code: only what you trust",
        )
    return parser


def _average(given: argparse.Namespace) -> int:
    _check_output(given.output, given.force)
    safe = not given.unsafe
    mean = average_checkpoints(
        given.files, given.weights, key=given.key, weights_only=safe, progress=sys.stderr.isatty()
    )
    left_out: list[str] = []
    if safe_reading.is_safetensors(given.output):
        save_safetensors(mean, given.output)
    else:
        content, left_out = _content(given.files[-1], mean, given.key, safe)
        with write_atomically(given.output) as beside, open(beside, "wb") as file:
            torch.save(content, file)
    print(f"{given.output}: the mean of {len(given.files)} files" + _on_one_line(_said_of(left_out)))
    return 0


def _check_output(path: str, force: bool) -> None:
    """Refuse an output that could not be written, before anything is read."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: give the name of a file")
    if os.path.lexists(path) and not force:
        raise ValueError(f"{path} exists: choose another name, or pass --force")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{path} cannot be written: there is no folder {folder}")


def _content(last: str, mean: dict[Any, Any], key: str | None, weights_only: bool) -> tuple[dict[Any, Any], list[str]]:
    """Return the last file with the mean in the place of its weights, and the names of its entries that are left out.

    A Lightning checkpoint loses its training state, so that ``load_from_checkpoint`` finds the module's arguments and
    nothing that belongs to one file alone. Another file loses all other entries with tensors, such as an optimizer's
    state.
    """
    loaded = {} if safe_reading.is_safetensors(last) else reading.load_checkpoint(last, weights_only)
    is_lightning = "pytorch-lightning_version" in loaded
    where = key or reading.STATE_DICT if os.path.isdir(last) else reading.weights_key(loaded, last, key)
    if where is None or (os.path.isdir(last) and not is_lightning):
        return mean, []
    kept, left_out = {}, []
    for name, value in loaded.items():
        if name == where:
            kept[name] = mean
        elif is_lightning and name in _TRAINING:
            continue
        elif (not is_lightning or where != reading.STATE_DICT) and _has_tensors(value):
            left_out.append(str(name))
        else:
            kept[name] = value
    return {**kept, where: mean}, left_out


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _said_of(left_out: Sequence[str]) -> str:
    return f"; what else the last one holds of tensors is left out: {', '.join(left_out)}" if left_out else ""


def _inspect(given: argparse.Namespace) -> int:
    for path in given.files:
        for line in describe(path, weights_only=not given.unsafe, key=given.key):
            print(_on_one_line(line))
    return 0
