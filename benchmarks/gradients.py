"""What clipping, measuring and a penalty cost in a step, against torch's clipping alone and Lightning's `grad_norm`.

    python benchmarks/gradients.py

The hooks of real callbacks in running fits are timed, in turn, on the same gradients; what is shown are medians and
the ratios of medians. Three models: many small tensors, some middling, a few large.

Beside torch's clipping stand what a user would write without this package: clipping and `self.log` of the norm; the
penalty's gradient added, then clipping (the operations without which the three together cannot be had); and
`grad_norm`, then clipping.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import grad_norm
from models import MODELS
from running_fits import Hooks, operations, within_fits
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lightning_optim import L2, GradientClipping, GradientMonitor, WeightRegularization

NEVER = 10**9
WARMUP = 5
LAMBDA = 1e-4
RIVALS = ["torch clip", "torch clip + log", "penalty + torch clip", "grad_norm + torch clip"]


class TorchClipping(Callback):
    """Clip and log the norm by hand, in the hook that Lightning has for it."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        pl_module.log("norm", clip_grad_norm_(pl_module.parameters(), self.max_norm))


def three(max_norm: float) -> list[Callback]:
    return [WeightRegularization(L2(LAMBDA)), GradientMonitor(), GradientClipping(max_norm)]


def contest(
    shapes: list[tuple[int, ...]], max_norm: float, rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, int]]:
    """Median milliseconds and number of torch operations of each contestant."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    fresh = [torch.randn(shape) for shape in shapes]
    found: dict[str, tuple[float, int]] = {}

    def race(hooks: list[Hooks]) -> None:
        for parameter, grad in zip(parameters, fresh, strict=True):
            parameter.grad = grad.clone()
        grads = [parameter.grad for parameter in parameters]
        torch_clip_and_log, clip, clip_and_log, together, together_and_log = hooks
        values = [parameter.detach() for parameter in parameters]
        contestants: dict[str, Callable[[], Any]] = {
            "torch clip": lambda: clip_grad_norm_(parameters, max_norm),
            "torch clip + log": torch_clip_and_log,
            "penalty + torch clip": lambda: (
                torch._foreach_add_(grads, values, alpha=LAMBDA),
                clip_grad_norm_(parameters, max_norm),
            ),
            "grad_norm + torch clip": lambda: (grad_norm(clip.module, 2), clip_grad_norm_(parameters, max_norm)),
            "clip": clip,
            "clip + log": clip_and_log,
            "clip + monitor + penalty": together,
            "clip + monitor + penalty + log": together_and_log,
        }
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for round_ in range(rounds + WARMUP):
            for name, contestant in contestants.items():
                torch._foreach_copy_(grads, fresh)
                start = clock()
                contestant()
                if round_ >= WARMUP:
                    times[name].append(clock() - start)
        for name, contestant in contestants.items():
            torch._foreach_copy_(grads, fresh)
            found[name] = 1e3 * statistics.median(times[name]), operations(contestant)

    def one() -> list[Callback]:
        return [GradientClipping(max_norm)]

    by_hand: list[Callback] = [TorchClipping(max_norm)]
    fits = [(by_hand, 1), (one(), NEVER), (one(), 1), (three(max_norm), NEVER), (three(max_norm), 1)]
    within_fits(fits, parameters, race)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="how often each contestant runs (default: 100)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--cpu-time", action="store_true", help="count time on the CPU only, on a machine that is busy")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), medians of {arguments.rounds} rounds in turn\n")
    print("| model | gradients | contestant | ms | operations |", " | ".join(f"to {rival}" for rival in RIVALS), "|")
    print("| --- | --- | --- | ---: | ---: |", " | ".join("---:" for _ in RIVALS), "|")
    for model, shapes in MODELS.items():
        for gradients, max_norm in (("clipped", 1.0), ("within the bound", 1e9)):
            with contextlib.redirect_stdout(io.StringIO()):
                found = contest(shapes, max_norm, arguments.rounds, clock)
            for name, (median, count) in found.items():
                ratios = " | ".join(f"{median / found[rival][0]:.2f}" for rival in RIVALS)
                print(f"| {model} | {gradients} | {name} | {median:.2f} | {count} | {ratios} |")


if __name__ == "__main__":
    main()
