"""Average and describe checkpoints from the command line: ``lightning-optim average`` and ``inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import average_checkpoints
from lightning_optim.averaging.checkpoints.describing import describe
from lightning_optim.averaging.checkpoints.safetensors_writing import save_safetensors
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.atomic_writing import write_atomically
from lightning_optim.runtime.lightning.torch_internals import tree_leaves

# Entries that belong to the training of one checkpoint, not to the mean of several.
_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "loops", "current_model_state", "averaging_state")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 1 with a message on stderr.

    Args:
        arguments: The command and its arguments. Default: those of the process.

    Example::

        >>> main(["inspect", "missing.ckpt"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except Exception as error:  # a damaged file may raise anything
        expected = isinstance(error, OSError | ValueError | ImportError)
        message = str(error) if expected else safe_reading.first_line(error)
    paths = [*options.files, *([options.output] if "output" in options else [])]
    if not any(path in message for path in paths):
        message = f"{', '.join(options.files)}: {message}"
    print(f"lightning-optim: {_on_one_line(message)}", file=sys.stderr)
    return 1


def _on_one_line(text: str) -> str:
    """Escape line breaks and control characters, which the names in a checkpoint may contain."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-optim", description="Average the weights of checkpoints, or describe what a checkpoint holds."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    average = commands.add_parser(
        "average",
        help="write the weighted mean of the weights of several checkpoints",
        description="Write the weighted mean of the weights of several checkpoints, computed in fp32 or better.",
    )
    average.add_argument("files", nargs="+", help="checkpoints, state dicts, .safetensors files, or folders of shards")
    average.add_argument("-o", "--output", required=True, help="the .ckpt or .safetensors file to write")
    average.add_argument("--weights", nargs="+", type=float, help="one number >= 0 for each file; default: equal")
    average.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    average.set_defaults(run=_average)

    inspect = commands.add_parser(
        "inspect",
        help="print whether the weights of a checkpoint are averaged, and which averages it holds",
        description="Print whether the weights of each checkpoint are raw or averaged, and the averages that it holds:"
        " their kind, and the number and the steps of their updates.",
    )
    inspect.add_argument(
        "files", nargs="+", metavar="file", help="a checkpoint, state dict, .safetensors file or folder"
    )
    inspect.set_defaults(run=_inspect)

    for command in (average, inspect):
        command.add_argument(
            "--key",
            help="name of the entry with the weights; default: state_dict, model, model_state_dict or ema, or the whole"
            " file",
        )
        command.add_argument(
            "--unsafe",
            action="store_true",
            help="also read pickled objects, which can run any code: only for files that you trust",
        )
    return parser


def _average(options: argparse.Namespace) -> int:
    _check_output(options.output, options.force)
    safe = not options.unsafe
    mean = average_checkpoints(
        options.files, options.weights, key=options.key, weights_only=safe, progress=sys.stderr.isatty()
    )
    left_out: list[str] = []
    if safe_reading.is_safetensors(options.output):
        save_safetensors(mean, options.output)
    else:
        content, left_out = _content(options.files[-1], mean, options.key, safe)
        with write_atomically(options.output) as beside, open(beside, "wb") as file:
            torch.save(content, file)
    note = f"; other tensors of the last file are left out: {', '.join(left_out)}" if left_out else ""
    print(f"{options.output}: the mean of {len(options.files)} files" + _on_one_line(note))
    return 0


def _check_output(path: str, force: bool) -> None:
    """Raise if the output could not be written, before anything is read."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: pass the name of a file as --output")
    if os.path.lexists(path) and not force:
        raise ValueError(f"{path} exists: choose another name, or pass --force")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{path} cannot be written: the folder {folder} does not exist")


def _content(last: str, mean: dict[Any, Any], key: str | None, weights_only: bool) -> tuple[dict[Any, Any], list[str]]:
    """Return the last checkpoint with the mean as its weights, and the names of its entries that are left out.

    A Lightning checkpoint loses its training state: ``load_from_checkpoint`` finds the arguments of the module, and
    nothing that belongs to one checkpoint alone. Other files lose all other entries with tensors, such as the state of
    an optimizer.
    """
    loaded = {} if safe_reading.is_safetensors(last) else reading.load_checkpoint(last, weights_only)
    is_lightning = "pytorch-lightning_version" in loaded
    is_folder = os.path.isdir(last)
    where = (key or reading.STATE_DICT) if is_folder else reading.weights_key(loaded, last, key)
    if where is None or (is_folder and not is_lightning):
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


def _inspect(options: argparse.Namespace) -> int:
    for path in options.files:
        for line in describe(path, weights_only=not options.unsafe, key=options.key):
            print(_on_one_line(line))
    return 0
