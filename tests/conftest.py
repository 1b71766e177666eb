"""Set up all tests: one thread, a silent Lightning, and a group of two processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Before torch starts any thread: a process that is forked (`ddp_fork`) from one with OpenMP threads hangs when it uses
# them, and Lightning asks for as many threads as there are cores unless this is set.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.harness import process_group
from tests.lightning import OTHER


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run all 81 cells for every entry of the registry")
    parser.addoption("--sample", action="store_true", help="run one entry of each slot, and a part of the matrix")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use a worker per core for the whole suite; for a part of it, the imports of workers would take longer."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count() or 1) if whole else 0


@pytest.fixture(scope="session")
def group() -> Iterator[process_group.Group]:
    """Start a gloo group of two processes that lives as long as the tests."""
    with process_group.Group(2) as pair:
        yield pair


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample; let the server of the group import its modules while this process does."""
    if config.getoption("--sample"):
        config.hook.pytest_deselected(items=[item for item in items if not _in_sample(item)])
        items[:] = [item for item in items if _in_sample(item)]
    if any("group" in getattr(item, "fixturenames", ()) for item in items):
        process_group.start_server()
    process_group.settle()


@pytest.fixture(scope="session", autouse=True)
def _one_package_of_lightning() -> Iterator[None]:
    """Fail at the end if anything has imported the package that the tests do not run with."""
    yield
    assert OTHER not in sys.modules


def _in_sample(item: pytest.Item) -> bool:
    from tests.integration.entry_fits import SLOT_ENTRIES

    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    entry, cell = parameters.get("entry"), parameters.get("cell")
    if entry is not None and cell is not None and hasattr(cell, "windows"):
        # Each entry in one cell at least, those of the slots in each strategy, and these also with a loss scaler.
        # Two networks in float16 differ from the loop by 1e-4 with torch 2.7 and Lightning 2.5, also without callbacks.
        in_float16 = cell.precision == "16-mixed" and cell.kind != "two"
        return cell.windows == "4short" and (cell.precision == "32-true" or (entry in SLOT_ENTRIES and in_float16))
    return entry is None or entry in SLOT_ENTRIES


@pytest.fixture(autouse=True)
def _no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the seed that ``seed_everything`` leaves in the environment, where launched processes read it."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
