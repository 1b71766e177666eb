"""A run that is killed and resumed from a checkpoint equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness.cells import Cell
from tests.integration.entry_fits import SLOT_ENTRIES, TENSOR_ENTRIES, choice_for, each_entry_by
from tests.integration.forked_processes import in_forks, results
from tests.integration.kill_and_resume import Case, assert_same_run, killed, resumed, resumed_from, uninterrupted
from tests.registry import Entry

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using")


def _strategies(entry: Entry) -> tuple[str, ...]:
    if entry.refusal((0,)) is not None:
        return ("ddp",)  # FSDP2 raises an error before the first step
    return ("ddp", "fsdp2") if entry in SLOT_ENTRIES else (choice_for(entry, "fsdp2", "ddp", "fsdp2"),)


STRATEGIES = [(entry, strategy) for entry in TENSOR_ENTRIES for strategy in _strategies(entry)]


def _named(value: Any) -> str:
    return value.name if isinstance(value, Entry) else str(value)


@each_entry_by("manual", False, True)
def test_one_process(entry: Entry, manual: bool, tmp_path: Path) -> None:
    """All checkpoints resume with `ExactResume`; without it only those that no validation follows.

    A resume without the callbacks differs, so that the comparison sees them.
    """
    kind = choice_for(entry, "manual", "two") if manual else "automatic"
    case = Case(entry.name, Cell(kind, "32-true", "single", "4short"))
    whole = uninterrupted(case)
    assert [end.signal for end in in_forks(1, killed, case, tmp_path)] == [signal.SIGKILL]
    for name in ("validating", _last_step(tmp_path)):
        assert_same_run(resumed(case, tmp_path / f"{name}.ckpt"), whole)
    assert_same_run(resumed(case, tmp_path / "inside.ckpt", exact=False), whole, exact=False)
    with pytest.raises(AssertionError):
        assert_same_run(resumed(case, tmp_path / "inside.ckpt", callbacks=[]), whole)


def _last_step(folder: Path) -> str:
    return max(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns).stem


@pytest.mark.parametrize(("entry", "strategy"), STRATEGIES, ids=_named)
def test_two_processes(entry: Entry, strategy: Any, tmp_path: Path) -> None:
    """Two ranks are killed and two new ones resume: after a step, and within a window before a validation.

    Under FSDP2 one of the two checkpoints is a folder and the other a single file, in turn over the entries.
    """
    kind, distributed = choice_for(entry, ("automatic", False), ("two", False), ("automatic", True), ("two", True))
    case = Case(entry.name, Cell(kind, "32-true", strategy, "4short"), distributed)
    assert [end.signal for end in in_forks(2, killed, case, tmp_path)] == [signal.SIGKILL] * 2
    paths = [tmp_path / f"{name}.ckpt" for name in ("validating", _last_step(tmp_path))]
    assert [path.is_dir() for path in paths] == [
        strategy == "fsdp2" and kind for kind in (not distributed, distributed)
    ]
    for whole, *runs in results(2, resumed_from, case, paths):
        for run in runs:
            assert_same_run(run, whole)
