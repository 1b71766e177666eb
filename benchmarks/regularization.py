"""Measure what penalties and weight decay cost in a step, against autograd and against torch's bare calls.

    python benchmarks/regularization.py

The hooks of real callbacks in running fits are timed, in turn, on the same weights; shown are medians, and medians of
the ratios within a round. Three models: many small tensors, some of middle size, a few large.

* L1 + L2: `WeightRegularization([L1(s), L2(s)])` against the two terms added to the loss, as a textbook has it, and
  against bare foreach calls on prepared lists of weights and gradients.
* Weight decay: `WeightRegularization(WeightDecay(s))` against a bare multiplication of the prepared list; with
  `cautious=True` against that and one copy of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allocations import LargestAllocation
from models import MODELS
from running_fits import Hooks, within_fits
from torch import nn

from lightning_optim import L1, L2, WeightDecay, WeightRegularization

NEVER = 10**9
WARMUP = 5
S = 1e-9  # so weak that the weights stay as they are in all rounds


def contest(shapes: list[tuple[int, ...]], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the milliseconds of each contestant in each round, and the largest allocation of ours in MB."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    found: dict[str, Any] = {}

    def race(hooks: list[Hooks]) -> None:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        grads, values = [p.grad for p in parameters], [p.detach() for p in parameters]
        copies = [torch.empty_like(value) for value in values]
        penalized, decayed, cautious = hooks

        def textbook() -> None:
            absolute = sum(parameter.abs().sum() for parameter in parameters)
            squares = sum(parameter.square().sum() for parameter in parameters)
            (S * absolute + S * squares).backward()

        def bare_penalties() -> None:
            torch._foreach_add_(grads, torch._foreach_sign(values), alpha=S)
            torch._foreach_add_(grads, values, alpha=2.0 * S)

        def bare_copy_and_decay() -> None:
            torch._foreach_copy_(copies, values)
            torch._foreach_mul_(values, 1.0 - S)

        contestants: dict[str, Callable[[], Any]] = {
            "textbook L1 + L2": textbook,
            "bare L1 + L2": bare_penalties,
            "L1 + L2": penalized,
            "bare decay": lambda: torch._foreach_mul_(values, 1.0 - S),
            "decay": decayed,
            "bare copy + decay": bare_copy_and_decay,
            "cautious decay": cautious,
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(rounds + WARMUP):
            for name, contestant in contestants.items():
                start = clock()
                contestant()
                if round_ >= WARMUP:
                    times[name].append(1e3 * (clock() - start))
        allocated: dict[str, float] = {}
        for name in ("L1 + L2", "decay", "cautious decay"):
            with LargestAllocation() as made:
                contestants[name]()
            allocated[name] = made.megabytes
        found.update(times=times, allocated=allocated)

    decays = (WeightDecay(S, cautious, follows_lr=False) for cautious in (False, True))
    callbacks = [WeightRegularization([L1(S), L2(S)]), *map(WeightRegularization, decays)]
    within_fits([([callback], NEVER) for callback in callbacks], parameters, race)
    return found


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median of the ratios of two contestants within a round."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


RATIOS = [
    ("L1 + L2", "textbook L1 + L2"),
    ("L1 + L2", "bare L1 + L2"),
    ("decay", "bare decay"),
    ("cautious decay", "bare copy + decay"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="how often each contestant runs (default: 60)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="count time on the CPU only, on a machine that is busy")
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    figures: dict[str, Any] = {}
    print(f"torch {torch.__version__}, {given.threads} thread(s), medians of {given.rounds} rounds in turn\n")
    for model, shapes in MODELS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            found = contest(shapes, given.rounds, time.thread_time if given.cpu_time else time.perf_counter)
        times = found["times"]
        figures[model] = {
            "ms": {name: statistics.median(own) for name, own in times.items()},
            "ratio": {f"{one} / {other}": ratio(times, one, other) for one, other in RATIOS},
            "largest allocation, MB": found["allocated"],
        }
        print(model)
        for what, values in figures[model].items():
            print(f"    {what}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
