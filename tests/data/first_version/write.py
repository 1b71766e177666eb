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

os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests, before torch starts: threads add in another order

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from tests.data.first_version import ensembles, runs
from tests.data.first_version.cases import CASES, Case


def write(case: Case) -> None:
    """Write the file of a case, and how its run ended."""
    path, end_path = Path(f"{case.name}.ckpt"), Path(f"{case.name}.end")
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
    torch.save({"there": there, "end": end, "states": states, "without": lost}, end_path)
    sizes = [pack(path, runs.CHECKPOINT), pack(end_path, runs.END)]
    print(case.name, sizes, {key: " ".join(what) for key, what in lost.items()}, flush=True)


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


def main(names: list[str]) -> None:
    """Write the files of these cases, or all."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for case in (case for case in CASES if not names or case.name in names):
            write(case)
        if not names or "ensembles" in names:
            ensembles.write_members()
            ensembles.write_ensemble()
            files = [("members.end", runs.END), ("ensemble.ckpt", runs.CHECKPOINT), ("ensemble.end", runs.END)]
            print("ensembles", [pack(Path(path), ending) for path, ending in files])
        os.chdir(runs.HERE)


if __name__ == "__main__":
    main(sys.argv[1:])
