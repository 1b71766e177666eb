"""Files of the first version resume here, and the runs end as they would have ended with the first version.

What the files are, and how they came about, is said in ``tests/data/first_version``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import WeightAveraging, averaged_state_dict
from tests.data.first_version import ensembles, ranks, runs
from tests.data.first_version.cases import CASES, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    # The cases are as the first version ran them, which knew no infinite patience.
    pytest.mark.filterwarnings("ignore:EarlyStopping cannot stop this run"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
FORGETFUL = [case for case in CASES if case.name != "entry_plain"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tolerance_here(case: Case, there: dict[str, Any]) -> float:
    """Return the allowed error of a resumed run against the saved one: 0, unless this processor rounds differently.

    Processors, and versions of torch, add in different orders, and their results differ in the last digits. Whether
    they do for this very run is seen from its beginning, which is computed here once more up to the moment of the file:
    if weights, momentum and all that callbacks show are those of the file, bit for bit, then what comes after the file
    must be the same bit for bit too. If not, they must be near, and what comes after may be as far. So a change in how
    something is computed, which shows in the beginning as well, is no excuse for more than that.
    """
    with pytest.MonkeyPatch.context() as patch:
        Path("begun").mkdir()
        patch.chdir("begun")
        begun = runs.begun(case)
    _tell_as_the_first_version(begun, there)
    assert not runs.differences(begun, there, case.tolerance)
    return case.tolerance if runs.differences(begun, there) else 0.0


def tolerance_of_no_case() -> float:
    """The same for files that are of no case: what holds for a run with the same module and callbacks of many kinds."""
    case = next(case for case in CASES if case.name == "everything")
    return tolerance_here(case, runs.unpack_end(case.name)["there"])


@each_case
def test_a_run_goes_on_from_its_file_and_ends_as_it_would_have(case: Case, tmp_path: Path) -> None:
    path, first = runs.unpack(case.name, tmp_path)
    tolerance = tolerance_here(case, first["there"])
    _, end = runs.resumed(case, path, first["there"]["position"])
    _tell_as_the_first_version(end, first["end"])
    assert not runs.differences(end, first["end"], tolerance)


def _tell_as_the_first_version(end: dict[str, Any], first: dict[str, Any]) -> None:
    """Undo what is told otherwise since: shares of zeros in the log, more metrics in a history, and a singular."""
    logged, known_names = end.get("logged", {}), first.get("logged", {})  # the state at the file has none
    for name in logged.keys() - known_names.keys():
        assert name == "epoch" or name.startswith("regularization/zeros")
        del logged[name]
    if "epoch" in logged:  # which Lightning logs beside whatever is logged
        logged["epoch"] = {step: value for step, value in logged["epoch"].items() if step in known_names["epoch"]}
    for ours, known in zip(end["read"], first["read"], strict=True):
        for values, old in zip(ours.get("history", []), known.get("history", []), strict=True):
            assert values.keys() >= old.keys()
            for name in values.keys() - old.keys():
                del values[name]
        if message := ours.get("stopping_reason_message"):
            ours["stopping_reason_message"] = message.replace("in the last check.", "in the last 1 checks.")


@pytest.mark.parametrize("case", FORGETFUL, ids=lambda case: case.name)
def test_a_run_whose_file_lost_a_state_ends_otherwise(case: Case, tmp_path: Path) -> None:
    path, first = runs.unpack(case.name, tmp_path)
    assert first["without"].keys() == torch.load(path, weights_only=True)["callbacks"].keys()
    needed = {key: parts for key, parts in first["without"].items() if parts}
    assert needed
    for key, parts in needed.items():
        end, known = runs.without(case, key, path, tmp_path / "without.ckpt", first["there"]["position"]), first["end"]
        if parts != ["steps"]:
            end, known = runs.but_for_steps(end), runs.but_for_steps(known)
        assert runs.differences(end, known, case.tolerance), key


AVERAGES = [
    pytest.param(case, index, id=f"{case.name}-{index}")
    for case in CASES
    for index, callback in enumerate(case.callbacks())
    if isinstance(callback, WeightAveraging) and case.after and (callback.evaluates or callback.name)
]


@pytest.mark.parametrize(("case", "index"), AVERAGES)
def test_an_average_is_read_out_of_a_file(case: Case, index: int, tmp_path: Path) -> None:
    path, first = runs.unpack(case.name, tmp_path)
    averaged = averaged_state_dict(path, case.callbacks()[index].name)  # type: ignore[attr-defined]
    known = first["there"]["read"][index]["averaged"]
    if case.name == "frozen":
        del known["net.inner.weight"]  # which the module leaves out of its files
    assert not runs.differences(dict(averaged), known)


def test_an_ensemble_predicts_what_it_predicted(tmp_path: Path) -> None:
    path, first = runs.unpack("ensemble", tmp_path)
    ensemble = ensembles.load_ensemble(path)
    assert not runs.differences(ensembles.predictions(ensemble), first["predictions"], tolerance_of_no_case())
    assert [member.added for member in ensemble.members] == ["of 5", "of 6"]  # what the members saved by themselves
    # What the file says of the ensemble is needed: without it another mean comes out.
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["ensemble"] |= {"outputs": "values", "dim": None}
    torch.save(checkpoint, path)
    assert runs.differences(ensembles.predictions(ensembles.load_ensemble(path)), first["predictions"], 1e-6)


def test_members_of_a_killed_run_are_finished(tmp_path: Path) -> None:
    folder = tmp_path / "members"
    first = ensembles.unpack_members(folder)
    finished = ensembles.held(folder)
    trained = ensembles.fit(folder)
    assert trained == first["trained"], "the member that was under way did not go on from its file"
    held = ensembles.held(folder)
    assert not runs.differences(held["member-0"], finished["member-0"]), "a finished member was trained again"
    assert not runs.differences(held, first["held"], tolerance_of_no_case())


@pytest.mark.parametrize("lost", ["fit_members", "callbacks"])
def test_a_member_whose_file_lost_its_mark_or_its_state_is_another(tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "members"
    first = ensembles.unpack_members(folder)
    path = ensembles.under_way(folder)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[lost]
    torch.save(checkpoint, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not exact
        trained = ensembles.fit(folder)
    assert trained != first["trained"] or runs.differences(ensembles.held(folder), first["held"], 1e-6)


def test_each_file_has_a_case() -> None:
    names = [case.name for case in CASES]
    packed = [f"{name}{runs.CHECKPOINT}" for name in [*names, "ensemble"]]
    packed += [f"{name}.tar.xz" for name in ["members", *ranks.KINDS]]
    packed += [f"{name}{runs.END}" for name in [*names, "ensemble", "members", *ranks.KINDS]]
    assert sorted(path.name for path in runs.HERE.glob("*.xz")) == sorted(packed)
    assert sum(path.stat().st_size for path in runs.HERE.rglob("*") if path.suffix != ".pyc") < 600_000


@pytest.mark.parametrize("off", [0.0, 1e-7, 1e-5])
def test_differences_are_seen(off: float) -> None:
    one, other = [torch.ones(2), 1.0, torch.tensor(float("nan"))], [torch.ones(2) + off, 1.0 + off, torch.tensor(0.0)]
    assert bool(runs.differences(one[:2], other[:2])) is (off > 0.0)
    assert bool(runs.differences(one[:2], other[:2], 1e-6)) is (off > 1e-6)
    assert runs.differences(one[2], other[2], 1e-6) and not runs.differences(one[2], one[2])
    assert runs.differences({"a": 1}, {}) and runs.differences([1], [1, 2]) and runs.differences(1, 1.0)
