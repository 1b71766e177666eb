"""What an average costs at a step and in a swap, and the mean of ten checkpoints, against peers and against the limit.

    python benchmarks/averaging.py

One EMA update is timed in turn, round by round, in one process: this package's callback in a running fit, Lightning's
in another, torch-ema, ema-pytorch, and the bare `torch._foreach_lerp_` on prepared lists, which is the limit. What is
shown are medians and medians of the ratios within a round. Three models: many small tensors, some middling, a few
large.

The mean of files is timed against loading the same files one after the other, in turn, in processes of their own, so
that memory is theirs. Two measures of it: *anonymous* is what a process has asked for; *resident* has also the pages of
mapped files, which the kernel takes back when others need them.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ema_pytorch
import torch
import torch_ema
from allocations import LargestAllocation
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging as TheirEMA
from models import MODELS
from running_fits import Model
from torch import Tensor, nn

from lightning_optim import EMA, WeightAveraging, average_checkpoints

DECAY = 0.999
CLOCKS: dict[bool, Callable[[], float]] = {False: time.perf_counter, True: time.process_time}


def within_fit(weights: nn.ParameterList, callback: Callback, act: Callable[[Model], None]) -> None:
    """Call `act` where a training step would be."""
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=[callback], max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(weights, act))


def our_update(model: Model, callback: WeightAveraging) -> Callable[[], None]:
    """What the post-hook of the optimizer does."""
    trainer, optimizer = model.trainer, model.trainer.optimizers[0]

    @torch.no_grad()
    def update() -> None:
        callback.steps[0] += 1
        callback.on_after_optimizer_step(trainer, model, optimizer)

    return update


def their_update(model: Model, callback: TheirEMA) -> Callable[[], None]:
    """Lightning's update of its copy of the module."""
    average = callback._average_model
    assert average is not None
    return lambda: average.update_parameters(model)


def bare(parameters: list[Tensor]) -> Callable[[], None]:
    averaged = [p.detach().clone() for p in parameters]
    current = [p.detach() for p in parameters]

    @torch.no_grad()
    def update() -> None:
        torch._foreach_lerp_(averaged, current, 1.0 - DECAY)

    return update


class Plain(nn.Module):
    """What ema-pytorch takes a copy of."""

    def __init__(self, weights: nn.ParameterList) -> None:
        super().__init__()
        self.weights = weights


def updates(name: str, rounds: int, cpu: bool) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of one update by each, in turn; and megabytes that a swap allocates."""
    generator = torch.Generator().manual_seed(0)
    weights = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in MODELS[name])
    parameters = list(weights)
    theirs = ema_pytorch.EMA(Plain(weights), beta=DECAY, update_after_step=0, update_every=1)
    old = torch_ema.ExponentialMovingAverage(parameters, decay=DECAY)
    clock = CLOCKS[cpu]
    found: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    ours, lightnings = WeightAveraging(EMA(DECAY)), TheirEMA(decay=DECAY)

    def inner(model: Model, outer: Model) -> None:
        run = {
            "limit": bare(parameters),
            "lightning_optim": our_update(outer, ours),
            "Lightning": their_update(model, lightnings),
            "torch-ema": old.update,
            "ema-pytorch": theirs.update,
        }
        for update in run.values():
            for _ in range(3):
                update()
        for _ in range(rounds):
            for who, update in run.items():
                start = clock()
                update()
                found.setdefault(who, []).append(clock() - start)
        with LargestAllocation() as made, ours.averaged_weights(outer):
            pass
        memory["swap, MB"] = made.megabytes
        with LargestAllocation() as made:
            run["lightning_optim"]()
        memory["update, MB"] = made.megabytes

    within_fit(weights, ours, lambda outer: within_fit(weights, lightnings, lambda model: inner(model, outer)))
    return found, memory


# ---- files -----------------------------------------------------------------------------------------------------------


def write_files(folder: str, count: int) -> dict[str, list[str]]:
    """Files of 102 MB in 320 tensors, as Lightning and as safetensors writes them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[str]] = {"ckpt": [], "safetensors": []}
    for index in range(count):
        state = {f"layer{i}.weight": torch.randn(320, 250, generator=generator) for i in range(320)}
        files["ckpt"].append(f"{folder}/{index}.ckpt")
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, files["ckpt"][-1])
        files["safetensors"].append(f"{folder}/{index}.safetensors")
        save_file(state, files["safetensors"][-1])
    return files


def load_each(paths: list[str]) -> None:
    """Each file as a user would load it, one after the other; safetensors maps it, and reads what is copied."""
    from safetensors.torch import load_file

    for path in paths:
        if path.endswith(".safetensors"):
            _ = {name: value.clone() for name, value in load_file(path).items()}
        else:
            torch.load(path)


def memory(kind: str) -> float:
    """The memory of this process in GB: ``RssAnon`` is anonymous, ``VmRSS`` resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1e6
    raise RuntimeError(f"no {kind} in /proc/self/status")


def measure(paths: list[str], rounds: int, cpu: bool, pipe: Any) -> None:
    """In a process of its own: the times of the mean and of loading, in turn, and how far memory grew in the first."""
    import threading

    torch.set_num_threads(1)
    clock = CLOCKS[cpu]
    small = f"{paths[0]}.small"
    torch.save({"w": torch.ones(1)}, small)
    average_checkpoints([small])  # once, so that code is loaded
    kinds = ("RssAnon", "VmRSS")
    before, over = {kind: memory(kind) for kind in kinds}, threading.Event()
    peak = dict.fromkeys(kinds, 0.0)

    def watch() -> None:
        while not over.wait(0.002):
            peak.update({kind: max(peak[kind], memory(kind) - before[kind]) for kind in kinds})

    threading.Thread(target=watch, daemon=True).start()
    average_checkpoints(paths)
    over.set()
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for run in (average_checkpoints, load_each):
            start = clock()
            kept = run(paths)
            times.setdefault(run.__name__, []).append(clock() - start)
            del kept  # to give a result's memory back is no part of making it
    pipe.send((times, peak))


def files_table(rounds: int, count: int, cpu: bool) -> dict[str, dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, paths in write_files(folder, count).items():
            for some in (paths[:2], paths):
                here, there = context.Pipe()
                process = context.Process(target=measure, args=(some, rounds, cpu, there))
                process.start()
                there.close()
                times, peak = here.recv()
                process.join()
                means, loads = times["average_checkpoints"], times["load_each"]
                ratios = [mean / load for mean, load in zip(means, loads, strict=True)]
                table[f"{len(some)} {kind}"] = {
                    "mean, s": statistics.median(means),
                    "loading, s": statistics.median(loads),
                    "ratio": statistics.median(ratios),
                    "anonymous, GB": peak["RssAnon"],
                    "resident, GB": peak["VmRSS"],
                }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--cpu", action="store_true", help="time of the process, for a machine that others use too")
    parser.add_argument("--only-files", action="store_true", help="leave out the updates")
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"updates": {}, "memory": {}}
    print("One EMA update: median in ms, and median of the ratio to the limit within a round\n")
    for name in [] if given.only_files else MODELS:
        found, allocated = updates(name, given.rounds, given.cpu)
        figures["memory"][name] = allocated
        row = {}
        for who, seconds in found.items():
            ratio = statistics.median(own / limit for own, limit in zip(seconds, found["limit"], strict=True))
            row[who] = {"ms": 1e3 * statistics.median(seconds), "ratio": ratio}
        figures["updates"][name] = row
        print(f"{name}: " + ", ".join(f"{who} {v['ms']:.2f} ({v['ratio']:.2f})" for who, v in row.items()))
        print("    largest allocation: " + ", ".join(f"{what} {mb:.2f}" for what, mb in allocated.items()))
    print(f"\nThe mean of files of 102 MB against loading them in turn, {os.cpu_count()} cores\n")
    figures["files"] = files_table(max(3, given.rounds // 6), given.files, given.cpu)
    for what, values in figures["files"].items():
        print(f"{what}: " + ", ".join(f"{column} {value:.2f}" for column, value in values.items()))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
