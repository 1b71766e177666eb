"""The command line: ``lightning-optim average`` and ``lightning-optim inspect``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.averaging import reading
from lightning_optim.averaging.checkpoints import average_checkpoints
from lightning_optim.averaging.inspecting import describe

# What belongs to the training of one of the files, and not to their mean.
_TRAINING = ("callbacks", "optimizer_states", "lr_schedulers", "loops", "current_model_state", "averaging_state")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except (OSError, ValueError, ImportError) as error:
        print(f"lightning-optim: {error}", file=sys.stderr)
        return 1


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
            "--unsafe",
            action="store_true",
            help="read pickled objects too, which can run any code: only what you trust",
        )
    return parser


def _average(given: argparse.Namespace) -> int:
    if os.path.exists(given.output) and not given.force:
        raise ValueError(f"{given.output} exists: choose another name, or pass --force")
    safe = not given.unsafe
    mean = average_checkpoints(given.files, given.weights, weights_only=safe, progress=sys.stderr.isatty())
    beside = f"{given.output}.new"  # renamed when it is complete; the output may be one of the files, still mapped
    if reading.is_safetensors(given.output):
        _save_safetensors(mean, beside)
    else:
        torch.save(_checkpoint(given.files[-1], mean, safe), beside)
    os.replace(beside, given.output)
    print(f"{given.output}: the mean of {len(given.files)} files")
    return 0


def _checkpoint(last: str, mean: dict[str, Any], weights_only: bool) -> dict[str, Any]:
    """The last file without what belongs to its training, so that ``load_from_checkpoint`` finds its arguments."""
    loaded = {} if reading.is_safetensors(last) else reading.load_checkpoint(last, weights_only)
    if "pytorch-lightning_version" not in loaded:
        return mean
    return {**{name: value for name, value in loaded.items() if name not in _TRAINING}, "state_dict": mean}


def _save_safetensors(mean: dict[str, Any], path: str) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ModuleNotFoundError("a .safetensors file needs `pip install safetensors`") from error
    # The format knows neither ties nor strides.
    save_file({name: value.clone().contiguous() for name, value in mean.items() if isinstance(value, Tensor)}, path)


def _inspect(given: argparse.Namespace) -> int:
    for path in given.files:
        for line in describe(path, weights_only=not given.unsafe):
            print(line)
    return 0
