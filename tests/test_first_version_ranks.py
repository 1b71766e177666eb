"""Files that two processes wrote with the first version resume here, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.first_version import ranks, runs


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_runs_of_two_ranks_go_on_and_end_as_they_would_have(group: Any, kind: str, tmp_path: Path) -> None:
    path, first = ranks.unpack(kind, tmp_path)
    there, ends = [rank["there"] for rank in first], [rank["end"] for rank in first]
    begun = [rank["there"] for rank in group.run(ranks.uninterrupted, kind)]
    assert not runs.differences(begun, there, 1e-6)
    # Bit for bit, unless this processor computes otherwise: see `tolerance_here` in the test of one process.
    tolerance = 1e-6 if runs.differences(begun, there) else 0.0
    assert not runs.differences(group.run(ranks.resumed, kind, path, there[0]["position"]), ends, tolerance)


@pytest.mark.parametrize("kind", ranks.KINDS)
def test_runs_of_two_ranks_need_each_state(group: Any, kind: str, tmp_path: Path) -> None:
    path, first = ranks.unpack(kind, tmp_path)
    ends = [runs.but_for_steps(rank["end"]) for rank in first]
    for number, key in enumerate(ranks.keys_in(path)):
        ranks.lose(key, path, beside := tmp_path / f"without-{number}")
        resumed = group.run(ranks.resumed, kind, beside, first[0]["there"]["position"])
        assert runs.differences([runs.but_for_steps(end) for end in resumed], ends, 1e-6), key
