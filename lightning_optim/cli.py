"""Average and describe checkpoints from the command line: ``lightning-optim average``, ``soup`` and ``inspect``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.average_checkpoints import mean_of_checkpoints
from lightning_optim.averaging.checkpoints.averaged_state_dict import SavedAverage, averages_in
from lightning_optim.averaging.checkpoints.describing import describe
from lightning_optim.averaging.checkpoints.running_mean import StateDict
from lightning_optim.averaging.checkpoints.soup import make_soup
from lightning_optim.averaging.checkpoints.writing import check_ending, write_average
from lightning_optim.base.suggestions import nearest
from lightning_optim.ensembling.file_entries import describe_entries, member_label
from lightning_optim.runtime.files import safe_reading
from lightning_optim.runtime.files.near_paths import nearest_path
from lightning_optim.version import installed_version

_FILES = "checkpoints, state dicts, .safetensors files, or folders of shards"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 1 with a message on stderr.

    Args:
        arguments: The command and its arguments. Default: those of the process.

    Raises:
        SystemExit: If the arguments cannot be understood, with the code 2; after ``--help`` and ``--version``, with 0.

    Example::

        >>> main(["inspect", "missing.ckpt"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        _say("interrupted; no file was written")
        return 130
    except BrokenPipeError:  # what reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a damaged file may raise anything
        message = _message_of(error, options.files)
    paths = [*options.files, *([options.output] if "output" in options else [])]
    if not message.startswith("--") and not any(path in message for path in paths):
        message = f"{', '.join(options.files)}: {message}"
    _say(message)
    return 1


def _say(message: str) -> None:
    print(f"lightning-optim: {_on_one_line(message)}", file=sys.stderr)


def _on_one_line(text: str) -> str:
    """Escape line breaks and control characters, which the names in a checkpoint may contain."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _message_of(error: Exception, files: Sequence[str]) -> str:
    """Return the sentence of an error; of a file that does not exist, with the name of one like it."""
    if not isinstance(error, OSError | ValueError | ImportError):
        return safe_reading.first_line(error)
    if not isinstance(error, OSError) or not error.strerror or not isinstance(error.filename, str):
        return str(error)
    path = next((file for file in files if os.path.abspath(file) == error.filename), error.filename)
    fix = nearest_path(path) if isinstance(error, FileNotFoundError) else ""
    return f"{path}: {error.strerror}{fix}"


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Say in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_on_one_line(message)}; see `{self.prog} --help`\n")


class _CommandParser(_Parser):
    """Parse files and options in any order: by itself a parser takes the files before an option, and no later ones."""

    _is_within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_within:
            return super().parse_known_args(args, namespace)
        self._is_within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_within = False


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lightning-optim", description="Average the weights of checkpoints, or describe what a checkpoint holds."
    )
    parser.add_argument("--version", action="version", version=f"lightning-optim {installed_version()}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_CommandParser)

    average = commands.add_parser(
        "average",
        help="write the weighted mean of the weights of several checkpoints",
        description="Write the weighted mean of the weights of several checkpoints, computed in fp32 or better.",
        epilog="example: lightning-optim average --weights 0.25,0.75 A.ckpt B.ckpt -o OUT.ckpt",
    )
    average.add_argument("files", nargs="+", metavar="file", help=_FILES)
    average.add_argument(
        "--weights",
        action="append",
        metavar="W,W",
        help="a number >= 0 for each file, with commas; or the option once for each file. Default: equal",
    )
    average.set_defaults(run=_average)

    soup = commands.add_parser(
        "soup",
        help="write the mean of those of several checkpoints that do not make a score worse",
        description="Write a greedy soup: the mean of those of several checkpoints that do not make a score worse.",
        epilog="example: lightning-optim soup A.ckpt B.ckpt C.ckpt --score my_score:accuracy -o OUT.ckpt",
    )
    soup.add_argument("files", nargs="+", metavar="file", help=_FILES)
    soup.add_argument(
        "--score",
        required=True,
        metavar="MODULE:FUNCTION",
        help="a function from a state dict to a number, such as the accuracy on the validation set, in a module of the"
        " current folder, or in an installed one",
    )
    soup.add_argument("--mode", choices=("min", "max"), default="max", help="which score is best; default: max")
    soup.add_argument(
        "--no-barrier", action="store_true", help="also average models that are not linearly mode-connected"
    )
    soup.set_defaults(run=_soup)

    inspect = commands.add_parser(
        "inspect",
        help="print whether the weights of a checkpoint are averaged, and which averages it holds",
        description="Print whether the weights of each checkpoint are raw or averaged, of which others they are the"
        " mean, and the averages that it holds: their kind, and the number and the steps of their updates.",
    )
    inspect.add_argument(
        "files", nargs="+", metavar="file", help="a checkpoint, state dict, .safetensors file or folder"
    )
    inspect.set_defaults(run=_inspect)

    for command in (average, soup):
        endings = f"{', '.join(reading.ENDINGS[:-1])} or {reading.ENDINGS[-1]}"
        command.add_argument("-o", "--output", required=True, help=f"the file to write, which ends in {endings}")
        command.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    for command in (average, soup, inspect):
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


# ---- notes on the files ---------------------------------------------------------------------------------------------


class _Notes:
    """Tell after the result what a user may not expect of the files.

    Args:
        options: The arguments of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._files, self._key = list(options.files), options.key
        self._left: dict[str, SavedAverage] = {}  # an average that is not evaluated, by the path of its checkpoint
        self._members: dict[str, tuple[int, int]] = {}

    def hear(self, path: str, checkpoint: Mapping[Any, Any]) -> None:
        """Take note of a checkpoint that is read."""
        averages = averages_in(checkpoint)
        if averages and not self._key and not any(average.evaluated for average in averages):
            self._left[path] = averages[0]
        if (label := member_label(checkpoint)) is not None:
            self._members[path] = label

    def say(self) -> None:
        """Tell of files that are given twice, and of averages that were left where they are."""
        known = Counter(os.path.realpath(file) for file in self._files)
        for file in dict.fromkeys(self._files):
            if (count := known.pop(os.path.realpath(file), 1)) > 1:
                _say(f"note: {file} is given {count} times, and counts as often")
        if self._left:
            average = next(iter(self._left.values()))
            name = "" if average.name is None else f", {average.name!r}"
            _say(
                f"note: the raw weights of {self._shown(self._left)} were taken, and not the average beside them,"
                f" {average.kind}, which has evaluate=False: averaged_state_dict(path{name}) returns it"
            )

    def warn_of_members(self) -> None:
        """Warn of members that were trained apart, of which the mean is mostly useless."""
        if len({*self._members.values()}) > 1:
            _say(
                f"warning: {self._shown(self._members)} are members that fit_members trained, each with a seed of its"
                " own. Unless all began with the same weights, their mean is useless: average their predictions"
                " instead, with Ensemble.from_checkpoints"
            )

    def _shown(self, paths: Collection[str]) -> str:
        return "all files" if len({*self._files}) == len(paths) > 1 else ", ".join(paths)


# ---- average ---------------------------------------------------------------------------------------------------------


def _average(options: argparse.Namespace) -> int:
    _check_output(options.output, options.force)
    weights = _weights(options.weights, options.files)
    safe, notes = not options.unsafe, _Notes(options)
    mean, provenance = mean_of_checkpoints(
        options.files, weights, key=options.key, weights_only=safe, progress=sys.stderr.isatty(), notice=notes.hear
    )
    left_out = write_average(mean, options.output, provenance, options.files[-1], options.key, safe)
    count = len(options.files)
    what = f"the mean of {count} files" if count > 1 else "the weights of one file, which is no average"
    print(_on_one_line(f"{options.output}: {what}{_note(left_out)}"))
    notes.say()
    notes.warn_of_members()
    if count > 1:
        _warn_of_statistics(options.output, mean)
    return 0


def _weights(given: list[str] | None, files: Sequence[str]) -> list[float] | None:
    """Return the numbers of ``--weights``, one for each file."""
    if given is None:
        return None
    for text in (text for part in given for text in part.split(",")):
        try:
            float(text)
        except ValueError:
            raise ValueError(
                f"--weights takes numbers with commas, such as --weights 0.25,0.75, and {text!r} is no number"
            ) from None
    weights = [float(text) for part in given for text in part.split(",")]
    if len(weights) != len(files):
        numbers = [file for file in files if not os.path.exists(file) and _is_number(file)]
        hint = f"; with commas {','.join([*given, *numbers])} would be weights" if numbers else ""
        raise ValueError(
            f"--weights has {_counted(len(weights), 'number')} for {_counted(len(files), 'file')} ({', '.join(files)}):"
            f" give one for each file{hint}"
        )
    return weights


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _check_output(path: str, force: bool) -> None:
    """Raise if the output could not be written, before anything is read."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: pass the name of a file as --output")
    check_ending(path)
    if os.path.lexists(path) and not force:
        raise ValueError(f"{path} exists: choose another name, or pass --force")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"{path} cannot be written: the folder {folder} does not exist, make it first")


def _note(left_out: Sequence[str]) -> str:
    return f"; other tensors of the last file are left out: {', '.join(left_out)}" if left_out else ""


def _statistics(weights: Mapping[Any, Any]) -> dict[Any, Tensor]:
    """Return the running variances of BatchNorm in a state dict."""
    leaves = ((path, value) for path, value in reading.leaves(weights) if isinstance(value, Tensor))
    return {path: value for path, value in leaves if str(path[-1]).rpartition(".")[2] == "running_var"}


def _warn_of_statistics(path: str, weights: Mapping[Any, Any]) -> None:
    """Warn of running statistics, which were averaged like weights."""
    layers = len(_statistics(weights))
    if layers:
        _say(
            f"warning: {path} has the running statistics of {_counted(layers, 'BatchNorm layer')}, averaged like"
            " weights. Estimate better ones from training batches, with the averaged weights in the model:"
        )
        print("  lightning_optim.refresh_batchnorm_(model, train_loader)", file=sys.stderr)


# ---- soup ------------------------------------------------------------------------------------------------------------


def _soup(options: argparse.Namespace) -> int:
    _check_output(options.output, options.force)
    function = _imported(options.score)
    changes = False  # True if the function estimates running statistics itself

    def score(weights: StateDict) -> float:
        nonlocal changes
        before = {name: value.clone() for name, value in _statistics(weights).items()}
        try:
            found = function(weights)
        except Exception as error:
            raise ValueError(f"--score {options.score} raised {_place_of(error)}") from error
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"--score {options.score} returned {found!r:.80}: it must return a number") from None
        changes |= any(not value.equal(before[name]) for name, value in _statistics(weights).items() if name in before)
        return value

    barrier, notes = None if options.no_barrier else 0.1, _Notes(options)
    soup = make_soup(
        options.files,
        score,
        options.mode,
        barrier=barrier,
        key=options.key,
        weights_only=not options.unsafe,
        report=_print_step,
        notice=notes.hear,
    )
    left_out = soup._write(options.output)
    kept, tried = len(soup.kept), _counted(len(options.files), "file")
    alone = f": the weights of {soup.kept[0]} alone" if kept == 1 else ""
    line = f"{options.output}: a greedy soup of {kept} of {tried}, score {soup.score:.6g}{alone}{_note(left_out)}"
    print(_on_one_line(line))
    notes.say()
    if len(soup.kept) > 1 and not changes:
        _warn_of_statistics(options.output, soup)
    return 0


def _print_step(path: str, score: float, kept: bool | None, is_first: bool) -> None:
    if kept is None:
        line = f"{path} alone: {score:.6g}"
    elif is_first:
        line = f"soup of {path}: {score:.6g}"
    else:
        line = f"soup + {path}: {score:.6g}, {'kept' if kept else 'left out'}"
    print(_on_one_line(line), flush=True)


def _imported(name: str) -> Callable[[StateDict], Any]:
    """Return the function ``module:function``; modules in the current folder are found."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name or module_name.endswith(".py"):
        raise ValueError(f"--score must be a module and a function in it, such as my_score:accuracy, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        modules = [file.removesuffix(".py") for file in os.listdir() if file.endswith(".py")]
        near = nearest(module_name, modules) if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"--score {name}: importing {module_name} raised {_place_of(error)}{near}") from error
    function = getattr(found, function_name, None)
    if not callable(function):
        near = nearest(function_name, [one for one, value in vars(found).items() if callable(value)])
        raise ValueError(f"--score {name}: {module_name} has no function {function_name}{near or ': check the name'}")
    return function


def _place_of(error: Exception) -> str:
    """Return an error in one line, with the file and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    strange = ("-packages", "importlib", "<")  # the user's own line is wanted, and not one of torch
    theirs = [
        frame for frame in frames if frame.filename != __file__ and not any(part in frame.filename for part in strange)
    ]
    place = f" ({os.path.basename(theirs[-1].filename)}, line {theirs[-1].lineno})" if theirs else ""
    return f"{safe_reading.first_line(error)}{place}"


# ---- inspect ---------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    for path in options.files:
        for line in describe(path, not options.unsafe, options.key, describe_entries):
            print(_on_one_line(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
