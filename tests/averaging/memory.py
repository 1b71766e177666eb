"""Measure the peak memory of this process during a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_over_start(action: Callable[[], Any]) -> float:
    """Return by how many MB resident memory grew during a call; ``/proc`` can reset the peak."""

    def read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")
    start = read("VmRSS")
    action()
    return read("VmHWM") - start
