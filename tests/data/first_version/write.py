"""Write the files of this folder. It is not run again: they are what the first version of this package wrote.

The first version is that of commit 7c9ccfd. To see how the files came about, take that commit into a folder of its own,
copy this folder into its ``tests/data``, with a ``tests/data/__init__.py`` beside it, and there::

    python -m tests.data.first_version.write [case …]

A resume with the code that wrote a file must end as the run that was not interrupted, bit for bit, or nothing is
written. ``"without"`` says, for each callback's state in the file, in what a resume without it ends otherwise: in
nothing where it counts steps alone, and another callback knows their number.
"""

from __future__ import annotations

import lzma
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests, before torch starts: threads add in another order

import torch

from tests.data.first_version import ensembles, ranks, runs
from tests.data.first_version.cases import CASES, Case
from tests.lightning import isolate_rng


def write(case: Case) -> None:
    """Write the file of a case, and how its run ended."""
    path = Path(f"{case.name}.ckpt")
    there = runs.begun(case, path)
    leave_out_of_lightning(path)
    if case.folder is not None:
        shutil.copytree(case.folder, runs.HERE / case.folder, dirs_exist_ok=True)
    position = there["position"]
    run, again = runs.resumed(case, path, position)
    end, states = again, run.states()
    if case.after:
        shutil.rmtree(case.folder or "", ignore_errors=True)
        with isolate_rng():
            run = runs.whole(case)
            end, states = run.end(position), run.states()
        assert not (wrong := runs.differences(again, end)), "\n".join([case.name, *wrong])
    lost = {}
    for key in torch.load(path, weights_only=True)["callbacks"]:
        other = runs.without(case, key, path, Path("without.ckpt"), position)
        seen = runs.differences(runs.but_for_steps(other), runs.but_for_steps(end))
        lost[key] = sorted({difference.split("/")[1].split(":")[0] for difference in seen})
        if not seen and runs.differences(other, end):
            lost[key] = ["steps"]
    assert not lost or any(lost.values()), f"{case.name}: nothing is remembered"
    kept = {"there": there, "end": end, "states": states, "without": lost}
    sizes = [pack(path, runs.CHECKPOINT), keep_end(case.name, kept)]
    print(case.name, sizes, {key: " ".join(what) for key, what in lost.items()}, flush=True)


def write_ranks() -> None:
    """Write the files of two processes."""
    from tests.machine.groups import Group  # as it was called then

    with Group(2, timeout=300.0) as group:
        for kind in ranks.KINDS:
            Path(kind).mkdir()
            path = Path(kind, f"{kind}.ckpt").resolve()
            first = group.run(ranks.uninterrupted, kind, path)
            position, ends = first[0]["there"]["position"], [rank["end"] for rank in first]
            wrong = runs.differences(group.run(ranks.resumed, kind, path, position), ends)
            assert not wrong, "\n".join([kind, *wrong])
            for key in ranks.keys_in(path):
                ranks.lose(key, path, beside := Path(f"without-{kind}").resolve())
                assert runs.differences(group.run(ranks.resumed, kind, beside, position), ends), (kind, key)
            shutil.make_archive(str(runs.HERE / kind), "xztar", kind)
            print(kind, keep_end(kind, {"ranks": first}), (runs.HERE / f"{kind}.tar.xz").stat().st_size)


def leave_out_of_lightning(path: Path) -> None:
    """Take out the state of ``ModelCheckpoint``, which holds the names of files that are gone."""
    checkpoint = torch.load(path, weights_only=True)
    ours = {key: state for key, state in checkpoint["callbacks"].items() if "best_k_models" not in state}
    if ours.keys() != checkpoint["callbacks"].keys():
        torch.save(checkpoint | {"callbacks": ours}, path)


def pack(path: Path, ending: str) -> int:
    """Compress a file into this folder, and return its size there."""
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    (runs.HERE / f"{path.stem}{ending}").write_bytes(packed)
    return len(packed)


def keep_end(name: str, end: dict[str, Any]) -> int:
    """Keep what a run ended with, in the smaller of torch's formats, and return the size."""
    path = Path(f"{name}.end")
    torch.save(end, path, _use_new_zipfile_serialization=False)
    return pack(path, runs.END)


def main(names: list[str]) -> None:
    """Write the files of these cases, or all."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case in (case for case in CASES if not names or case.name in names):
            write(case)
        if not names or "ranks" in names:
            write_ranks()
        if not names or "ensembles" in names:
            print("members", keep_end("members", ensembles.write_members()))
            kept = ensembles.write_ensemble()
            print("ensemble", pack(Path("ensemble.ckpt"), runs.CHECKPOINT), keep_end("ensemble", kept))
        os.chdir(runs.HERE)


if __name__ == "__main__":
    main(sys.argv[1:])
