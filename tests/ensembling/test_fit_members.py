"""fit_members: each member from its own seed, and the same members after a kill at any moment."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import EMA, EarlyStopping, Ensemble, WeightAveraging, fit_members
from lightning_optim.ensembling.fit_members import member_seed
from lightning_optim.ensembling.member_files import FinishedMembers
from tests.ensembling.models import QUIET
from tests.integration.forked_processes import killed
from tests.lightning import Callback, LightningDataModule, LightningModule, ModelCheckpoint, Trainer, seed_everything

SIZE, BATCHES, EPOCHS = 3, 4, 3


class Net(LightningModule):
    """Draw random numbers from torch (weights, dropout), Python and NumPy."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        noise = random.random() + float(np.random.rand())
        return mse_loss(self.net(batch[0]), batch[1]) * (1 + 0.1 * noise)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Kill(Callback):
    """Record each batch in a file, since a killed run leaves no other trace; kill the process at the n-th.

    Args:
        notes: The file.
        after: The number n, counted in this process over all members.
    """

    def __init__(self, notes: Path, after: float = float("inf")) -> None:
        self.notes, self.after, self.batches = notes, after, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1
        with self.notes.open("a") as file:
            file.write("batch\n")
        if self.batches >= self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * 4, 2, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def shuffling(seed: int | None = None) -> DataLoader[Any]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(dataset(), batch_size=4, shuffle=True, generator=generator)


class Positioned:
    """Shuffle with the epoch as the seed, and save the position."""

    def __init__(self) -> None:
        self.epoch, self.position, self.loaded = 0, 0, False

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[Tensor]]:
        if not self.loaded:
            self.epoch, self.position = self.epoch + 1, 0
        self.loaded = False
        return self._batches()

    def _batches(self) -> Iterator[list[Tensor]]:
        parts = torch.randperm(4 * BATCHES, generator=torch.Generator().manual_seed(self.epoch)).split(4)
        for part in parts[self.position :]:
            self.position += 1
            yield list(dataset()[part])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self.loaded = state["epoch"], state["position"], True


def make_member(index: int) -> Net:
    return Net(4 + index % 2)


class Makes:
    """Make quiet Trainers with new callbacks, and remember them."""

    def __init__(self, *callbacks: Callable[[], Callback], **arguments: Any) -> None:
        self.callbacks, self.arguments = callbacks, {"enable_checkpointing": True, **arguments}
        self.trainers: list[Trainer] = []

    def __call__(self, index: int) -> Trainer:
        made = [make() for make in self.callbacks]
        self.trainers.append(Trainer(**{**QUIET, "max_epochs": EPOCHS, **self.arguments}, callbacks=made))
        return self.trainers[-1]


def weights(paths: list[str]) -> list[dict[str, Tensor]]:
    return [torch.load(path, weights_only=True)["state_dict"] for path in paths]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_each_member_is_the_fit_of_its_own_seed(tmp_path: Path) -> None:
    paths = fit_members(make_member, SIZE, Makes(), shuffling(), dirpath=tmp_path, seed=7)
    for index, found in enumerate(weights(paths)):
        seed_everything(member_seed(7, index), workers=True, verbose=False)
        model, trainer = make_member(index), Makes(enable_checkpointing=False)(index)
        trainer.fit(model, shuffling())
        assert same([found], [model.state_dict()])
    a, _, c = weights(paths)
    assert not torch.equal(a["net.0.weight"], c["net.0.weight"])
    assert Ensemble.from_checkpoints(Net, paths, outputs="values", on="net").members[1].hparams["width"] == 5


def test_the_seeds() -> None:
    seeds = [member_seed(seed, index) for seed in range(20) for index in range(200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert not set(seeds) & set(range(1000))
    assert abs(np.mean(seeds) / 2**32 - 0.5) < 0.02


@pytest.mark.parametrize("fails", [False, True])
def test_the_rest_of_the_program_draws_as_before(fails: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    environment = dict(os.environ)
    with pytest.raises(RuntimeError, match="out of luck") if fails else contextlib.nullcontext():
        fit_members(make_member, 1, Makes(Interrupted) if fails else Makes(), shuffling(), dirpath=tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert dict(os.environ) == environment


def test_finished_members_are_listed_and_not_trained_again(tmp_path: Path) -> None:
    paths = fit_members(make_member, 2, Makes(), shuffling(), dirpath=tmp_path)
    written = json.loads((tmp_path / "members.json").read_text())
    assert written["seed"] == 0
    assert [(m["index"], m["seed"], m["file"], m["epochs"], m["steps"]) for m in written["members"]] == [
        (index, member_seed(0, index), f"member-{index}.ckpt", EPOCHS, EPOCHS * BATCHES) for index in range(2)
    ]
    again = Makes()
    assert fit_members(make_member, 2, again, shuffling(), dirpath=tmp_path) == paths
    assert again.trainers == [] and not list(tmp_path.glob("*.part"))


def test_size_may_change_and_the_seed_may_not(tmp_path: Path) -> None:
    whole = weights(fit_members(make_member, SIZE, Makes(), shuffling(), dirpath=tmp_path / "whole"))
    for size in (1, SIZE, 2):
        paths = fit_members(make_member, size, Makes(), shuffling(), dirpath=tmp_path / "grown")
        assert same(weights(paths), whole[:size])
    with pytest.raises(ValueError, match=r"`seed=1` is not the seed of the members in .*grown, 0: pass"):
        fit_members(make_member, SIZE, Makes(), shuffling(), dirpath=tmp_path / "grown", seed=1)


def test_a_member_whose_file_is_gone_is_trained_again(tmp_path: Path) -> None:
    paths = fit_members(make_member, SIZE, Makes(), shuffling(), dirpath=tmp_path)
    before = weights(paths)
    Path(paths[1]).unlink()
    again = Makes()
    assert same(weights(fit_members(make_member, SIZE, again, shuffling(), dirpath=tmp_path)), before)
    assert len(again.trainers) == 1


FIT = EPOCHS * BATCHES


@pytest.mark.parametrize(
    ("data", "files", "trained"),
    [
        # Kill it at the 6th batch of the second member, at the next batch, and after 12 more. The number of trained
        # batches shows where it continued: from the end of the epoch before, if only that checkpoint is exact,
        pytest.param(shuffling, "each epoch", 18 + 1 + 12 + 12, id="epochs"),
        pytest.param(shuffling, "each batch", 18 + 1 + 12 + 12, id="batches-without-position"),
        pytest.param(partial(shuffling, 3), "one folder", 18 + 1 + 12 + 12, id="one-folder"),
        # from the batch before (the checkpoint of the last batch is not written yet),
        pytest.param(Positioned, "each batch", 18 + 1 + 12 + 8, id="batches-with-position"),
        # or from the seed.
        pytest.param(partial(shuffling, 3), "last batch", 18 + 1 + 12 + 12 + 12, id="no-exact-file"),
        pytest.param(shuffling, "none", 18 + 1 + 12 + 12 + 12, id="no-file"),
    ],
)
def test_a_killed_run_ends_with_the_same_members(data: Any, files: str, trained: int, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def run(folder: str, *callbacks: Callable[[], Callback]) -> list[dict[str, Tensor]]:
        makes = Makes(*saving(files, tmp_path / folder), *callbacks, enable_checkpointing=files != "none")
        return weights(fit_members(make_member, SIZE, makes, data(), dirpath=tmp_path / folder))

    expected = run("whole")
    for after in (FIT + 6, 1, FIT):
        kill = Kill(notes, after)
        killed(partial(run, "killed", lambda kill=kill: kill))
    assert same(run("killed", lambda: Kill(notes)), expected)
    assert len(notes.read_text().split()) == trained


def saving(files: str, folder: Path) -> list[Callable[[], Callback]]:
    return {
        "each epoch": [],
        "each batch": [partial(ModelCheckpoint, every_n_train_steps=1, save_top_k=-1)],
        "last batch": [partial(ModelCheckpoint, every_n_train_steps=1)],
        "one folder": [partial(ModelCheckpoint, dirpath=folder / "all", save_top_k=-1)],
        "none": [],
    }[files]


@pytest.mark.parametrize("moment", ["add", "path"])
def test_a_kill_between_the_fit_and_the_list_of_members(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(fit_members(make_member, 1, Makes(), shuffling(), dirpath=tmp_path / "whole"))

    def run_and_die() -> None:
        monkeypatch.setattr(FinishedMembers, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        fit_members(make_member, 1, Makes(), shuffling(), dirpath=tmp_path / "killed")

    killed(run_and_die)
    assert not (tmp_path / "killed" / "members.json").exists()
    again = Makes()
    assert same(weights(fit_members(make_member, 1, again, shuffling(), dirpath=tmp_path / "killed")), expected)
    assert again.trainers[0].ckpt_path is not None, "the epochs were done"


def test_a_checkpoint_that_a_kill_left_half_written_is_skipped(tmp_path: Path) -> None:
    expected = weights(fit_members(make_member, 1, Makes(), shuffling(), dirpath=tmp_path / "whole"))
    kill = Kill(tmp_path / "notes", BATCHES + 1)
    killed(lambda: fit_members(make_member, 1, Makes(lambda: kill), shuffling(), dirpath=tmp_path / "killed"))
    (half,) = (tmp_path / "killed" / "member-0").glob("*.ckpt")
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cannot be read, and is skipped"):
        found = fit_members(make_member, 1, Makes(), shuffling(), dirpath=tmp_path / "killed")
    assert same(weights(found), expected)


def test_a_members_file_holds_what_its_fit_ended_with(tmp_path: Path) -> None:
    made: list[Net] = []

    def remembered(index: int) -> Net:
        made.append(make_member(index))
        return made[-1]

    makes = Makes(lambda: WeightAveraging(EMA(0.9)))
    paths = fit_members(remembered, 2, makes, shuffling(), dirpath=tmp_path / "average")
    raw = fit_members(make_member, 2, Makes(), shuffling(), dirpath=tmp_path / "raw")
    assert same(weights(paths), [member.state_dict() for member in made])
    assert not same(weights(paths), weights(raw))


class Module(LightningDataModule):
    def train_dataloader(self) -> Any:
        return shuffling(5)


def test_kinds_of_data(tmp_path: Path) -> None:
    expected = weights(fit_members(make_member, 2, Makes(), shuffling(5), dirpath=tmp_path / "loader"))
    for name, data in (
        ("module", Module()),
        ("function", lambda index: shuffling(5)),
        ("several", {"a": shuffling(5)}),
    ):
        net = Net if name != "several" else Several
        paths = fit_members(lambda index, net=net: net(4 + index % 2), 2, Makes(), data, dirpath=tmp_path / name)
        assert same(weights(paths), expected), name
    bags = fit_members(make_member, 2, Makes(), lambda index: shuffling(index), dirpath=tmp_path / "bags")
    assert not same(weights(bags), expected)


class Validated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", mse_loss(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("val", [shuffling(), [shuffling()], lambda index: shuffling(index)], ids=["one", "list", "of"])
def test_a_validation_loader(val: Any, tmp_path: Path) -> None:
    makes = Makes(lambda: EarlyStopping("val_loss"))
    make = lambda index: Validated(4)  # noqa: E731
    fit_members(make, 2, makes, shuffling(), dirpath=tmp_path, val_dataloaders=val)
    read = [trainer.callbacks[i] for trainer in makes.trainers for i in range(len(trainer.callbacks))]
    assert [len(cb.history) for cb in read if isinstance(cb, EarlyStopping)] == [EPOCHS, EPOCHS]
    assert makes.trainers[0].val_dataloaders is not makes.trainers[1].val_dataloaders


def test_one_module_for_all_members_is_refused(tmp_path: Path) -> None:
    one = Net()
    for _ in range(
        2
    ):  # the second call finds the first member finished, and would train the second one from its weights
        with pytest.raises(ValueError, match=r"new module for each member, got the same Net again.*`lambda index: Net"):
            fit_members(lambda index: one, 2, Makes(), shuffling(), dirpath=tmp_path)


class Wraps(Net):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.hparams.clear()  # no module in the files
        self.net = net


@pytest.mark.parametrize("frozen", [False, True])
def test_members_share_only_what_no_fit_changes(frozen: bool, tmp_path: Path) -> None:
    shared = nn.Linear(2, 4).requires_grad_(not frozen)

    def make(index: int) -> Net:
        return Wraps(nn.Sequential(shared, nn.Linear(4, 1)))

    expected = (
        contextlib.nullcontext() if frozen else pytest.raises(ValueError, match=r"'net\.0\.weight' of this Wraps")
    )
    with expected:
        fit_members(make, 3, Makes(), shuffling(), dirpath=tmp_path)


def test_members_may_share_what_is_reset(tmp_path: Path) -> None:
    shared = nn.Linear(2, 4)
    first = copy.deepcopy(shared)

    def make(index: int) -> Net:
        shared.load_state_dict(first.state_dict())
        return Wraps(nn.Sequential(shared, nn.Linear(4, 1)))

    def make_new(index: int) -> Net:
        return Wraps(nn.Sequential(copy.deepcopy(first), nn.Linear(4, 1)))

    paths = fit_members(make, 3, Makes(), shuffling(), dirpath=tmp_path / "reset")
    new = fit_members(make_new, 3, Makes(), shuffling(), dirpath=tmp_path / "new")
    assert same(weights(paths), weights(new))
    with pytest.raises(ValueError, match=r"'net\.0\.weight' of this Wraps has been trained"):
        fit_members(lambda index: Wraps(nn.Sequential(shared)), 1, Makes(), shuffling(), dirpath=tmp_path / "trained")


def test_what_is_told_of_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_optim.ensembling.fit_members.rank_zero_info", said.append)
    fit_members(make_member, 1, Makes(), shuffling(), dirpath=tmp_path)
    fit_members(make_member, 3, Makes(), shuffling(), dirpath=tmp_path)
    assert [re.sub(r"\d+ s ", "N s ", sentence) for sentence in said] == [
        f"0 of 1 members are finished in {tmp_path}",
        "1 of 1 members finished (member 0)",
        f"1 of 3 members are finished in {tmp_path}",
        "2 of 3 members finished (member 1), about N s to go",
        "3 of 3 members finished (member 2)",
    ]


class Several(Net):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


def test_a_data_set_is_not_copied(tmp_path: Path) -> None:
    loader = shuffling()
    makes = Makes()
    fit_members(make_member, 2, makes, loader, dirpath=tmp_path)
    used = [trainer.train_dataloader for trainer in makes.trainers]
    assert used[0] is not used[1] and loader not in used
    assert all(copy.dataset is loader.dataset for copy in used)


USED = Makes()(0)


class Interrupted(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        raise RuntimeError("out of luck")


def test_a_fit_that_fails_is_no_member(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        fit_members(make_member, 1, Makes(Interrupted), shuffling(), dirpath=tmp_path)
    assert not (tmp_path / "members.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 0}, "`size` must be an integer >= 1"),
        ({"size": 2.0}, "`size` must be an integer >= 1"),
        ({"seed": -1}, "`seed` must be an integer >= 0"),
        ({"make_member": Net()}, r"function from the index .* got a Net: write `make_member=lambda index: Net\(…\)`"),
        ({"make_member": Net}, r"the class Net, .*: write `make_member=lambda index: Net\(…\)`"),
        ({"make_member": lambda: Net()}, r"called with the index alone.*: write `make_member=lambda index: …`"),
        ({"make_trainer": Makes()(0)}, r"got a Trainer: write `make_trainer=lambda index: Trainer\(…\)`"),
        ({"make_trainer": 3}, "`make_trainer` must be a function from the index to a new Trainer, got a int"),
        ({"make_member": lambda index: nn.Linear(1, 1)}, "`make_member` must return a LightningModule, got a Linear"),
        ({"make_trainer": lambda index: None}, "`make_trainer` must return a new .* got a NoneType"),
        ({"make_trainer": lambda index: USED, "size": 2}, "used already"),
        ({"data": [(x for x in ())]}, "`data` is copied for each member, and that failed"),
        ({"val_dataloaders": [(x for x in ())]}, "`val_dataloaders` is copied for each member, and that failed"),
        ({"data": (shuffling(), shuffling())}, "tuple of 2: write `data=train_loader, val_dataloaders=val_loader`"),
        ({"data": lambda index: (shuffling(), shuffling())}, "tuple of 2"),
        ({"data": Module(), "val_dataloaders": shuffling()}, "`val_dataloaders` must not be given with `data=Module"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    call = {"make_member": make_member, "size": 1, "make_trainer": Makes(), "data": shuffling()} | arguments
    with pytest.raises(ValueError, match=sentence):
        fit_members(dirpath=tmp_path, **call)
