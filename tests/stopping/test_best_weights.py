"""Test the best weights of modules that change during the fit, of frozen ones, and tensors that cannot be copied."""

from __future__ import annotations

import copy
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import EarlyStopping
from lightning_optim.stopping import best_weights
from tests.lightning import AsyncCheckpointIO, ModelPruning, TorchCheckpointIO
from tests.stopping.scripted_fits import Scripted, after, fit, same, weights

WORSE = [1.0, 2.0, 3.0]

each_place = pytest.mark.parametrize("in_directory", [False, True])


def stopping(tmp_path: Path, in_directory: bool) -> EarlyStopping:
    return EarlyStopping("val_loss", patience=math.inf, dirpath=str(tmp_path / "best") if in_directory else None)


class Buffered(Scripted):
    def __init__(self, scores: Any = WORSE, **buffers: Tensor) -> None:
        super().__init__(scores)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


# ---- a module that changes -------------------------------------------------------------------------------------------


def grow(module: Any) -> None:
    module.bank = torch.cat([module.bank, torch.ones(1, 2)])


def lose(module: Any) -> None:
    del module.bank


def empty(module: Any) -> None:
    module.bank = None


def add(module: Any) -> None:
    module.more = nn.Linear(2, 2)


def replace(module: Any) -> None:
    module.net[0], module.net[2] = nn.Linear(3, 5), nn.Linear(5, 1)


def take_away(module: Any) -> None:
    module.net[1] = nn.Identity()
    del module.bank
    module.net[0].bias = None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (grow, r"with another shape now: \['bank'\]"),
        (lose, r"no longer in the module: \['bank'\]"),
        (empty, r"no longer in the module: \['bank'\]"),
        (add, r"not in the best weights: \['more.bias', 'more.weight'\]"),
        (replace, r"with another shape now: \['net.0.bias', 'net.0.weight', 'net.2.weight'\]"),
        (take_away, r"no longer in the module: \['bank', 'net.0.bias'\]"),
    ],
)
@each_place
def test_a_module_that_changed(change: Any, said: str, in_directory: bool, tmp_path: Path) -> None:
    """Restore the weights that fit, leave the rest as in the last epoch, and name it in one warning."""

    class Changing(Buffered):
        def on_train_end(self) -> None:
            self.last = weights(self)

    module = Changing(bank=torch.zeros(3, 2))
    callback = stopping(tmp_path, in_directory)
    with pytest.warns(UserWarning, match=f"Not all of the best weights are restored: {said}. The rest") as caught:
        fit(module, callback, after(1, change), max_epochs=3)
    assert len([warning for warning in caught if "best" in str(warning.message)]) == 1
    best = {name: w for name, w in module.seen[0].items() if name in module.last and w.shape == module.last[name].shape}
    assert best
    assert same(weights(module), module.last | best)
    assert not same(module.last, module.last | best)


@each_place
def test_the_best_that_came_after_the_change_is_whole(in_directory: bool, tmp_path: Path) -> None:
    module = Buffered([2.0, 1.0, 3.0], bank=torch.zeros(3, 2), scratch=torch.zeros(2))

    def change(module: Any) -> None:
        grow(module)
        del module.scratch

    fit(module, stopping(tmp_path, in_directory), after(1, change), max_epochs=3)
    assert same(weights(module), module.seen[1])


@each_place
def test_pruning_that_was_made_permanent(in_directory: bool, tmp_path: Path) -> None:
    """Restore products of weights and masks if pruning was made permanent after the best validation."""
    checks: list[dict[str, Tensor]] = []

    class Looking(Scripted):
        def on_train_epoch_end(self) -> None:
            checks.append(weights(self))  # it has been pruned after its validation

    module = Looking(WORSE)
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    fit(module, stopping(tmp_path, in_directory), pruning, max_epochs=3)
    best = checks[0]
    for name in ("net.0", "net.2"):
        pruned = best[f"{name}.weight_orig"] * best[f"{name}.weight_mask"]
        assert torch.equal(module.get_submodule(name).weight, pruned)
        assert 0 < (pruned == 0).sum() < pruned.numel()
    assert torch.equal(module.net[2].bias, best["net.2.bias"])


@each_place
def test_tied_weights_that_are_no_longer_tied(in_directory: bool, tmp_path: Path) -> None:
    class Tied(Scripted):
        def __init__(self) -> None:
            super().__init__([1.0, 2.0, 3.0])
            self.net.append(nn.Linear(1, 1)).append(nn.Linear(1, 1))
            self.net[4].weight = self.net[3].weight

    def untie(module: Any) -> None:
        module.net[4].weight = nn.Parameter(module.net[3].weight.detach() + 1)

    module = Tied()
    callback = stopping(tmp_path, in_directory)
    fit(module, callback, max_epochs=3)
    assert same(weights(module), module.seen[0])
    assert module.net[4].weight is module.net[3].weight
    raw = [callback.state_dict()["raw"][f"net.{index}.weight"] for index in (3, 4)]
    assert torch.equal(raw[0], module.seen[2]["net.3.weight"])
    assert raw[0].data_ptr() == raw[1].data_ptr()
    module = Tied()
    fit(module, callback, after(1, untie), max_epochs=3)
    assert same(weights(module), module.seen[0])
    assert module.net[4].weight is not module.net[3].weight
    raw = callback.state_dict()["raw"]
    later = Tied()
    later.scores = {"val_loss": [3.0, 2.0, 1.0, 4.0]}
    fit(later, callback, after(2, untie), max_epochs=4)
    assert same(weights(later), later.seen[2]), "each has a copy of its own from then on"
    assert torch.equal(raw["net.4.weight"], module.seen[2]["net.4.weight"])
    assert not torch.equal(raw["net.4.weight"], raw["net.3.weight"])


@each_place
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_module_in_another_precision(dtype: torch.dtype, in_directory: bool, tmp_path: Path) -> None:
    class Converted(Scripted):
        def on_train_end(self) -> None:
            self.to(dtype)
            with torch.no_grad():
                self.net[0].weight.mul_(1 + torch.finfo(dtype).eps)
            self.raw = weights(self)

    module = Converted(WORSE)
    callback = stopping(tmp_path, in_directory)
    fit(module, callback, max_epochs=3)
    assert same(weights(module), {name: tensor.to(dtype) for name, tensor in module.seen[0].items()})
    assert same(callback.state_dict()["raw"], module.raw)
    assert {tensor.dtype for tensor in callback.state_dict()["raw"].values()} == {dtype}


# ---- what cannot be written ------------------------------------------------------------------------------------------


@each_place
def test_tensors_that_cannot_be_written_are_left_as_they_are(in_directory: bool, tmp_path: Path) -> None:
    """Without a warning: the elements of an expanded buffer share memory; a sparse one has no place for each."""
    buffers = {"expanded": torch.zeros(1).expand(3), "one": torch.zeros(1).expand(1)}
    buffers["sparse"] = torch.eye(3).to_sparse()
    module = Buffered(**buffers)
    fit(module, stopping(tmp_path, in_directory), after(1, lambda module: module.one.add_(1)), max_epochs=3)
    assert module.expanded.tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(module.sparse.to_dense(), torch.eye(3))
    assert module.one.tolist() == [0.0], "it has one element, and is written"
    assert torch.equal(module.net[0].weight, module.seen[0]["net.0.weight"])


def test_the_memory_format_is_kept() -> None:
    """Swap tensors in a memory format such as channels last without a second tensor."""

    class Images(Scripted):
        def __init__(self) -> None:
            super().__init__(WORSE)
            self.filters = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.filters.square().sum()

    module, callback = Images(), EarlyStopping("val_loss")
    fit(module, callback, max_epochs=3)
    assert torch.equal(module.filters, module.seen[0]["filters"])
    assert callback.state_dict()["raw"]["filters"].is_contiguous(memory_format=torch.channels_last)


# ---- copies, and other modules ---------------------------------------------------------------------------------------


@each_place
@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_after_the_fit_has_the_best(how: Any, in_directory: bool, tmp_path: Path) -> None:
    module, callback = Scripted(WORSE), stopping(tmp_path, in_directory)
    fit(module, callback, max_epochs=3)
    copied, other = how(callback), Scripted()
    with torch.no_grad():
        module.net[0].weight.zero_()  # the copied callback has its own weights
    copied.restore_best_(other)
    assert same(weights(other), module.seen[0])


@each_place
def test_the_best_of_a_compiled_module(in_directory: bool, tmp_path: Path) -> None:
    """Names with and without what `torch.compile` puts into them are the same."""

    class Compiled(Scripted):
        def __init__(self) -> None:
            super().__init__(WORSE)
            self.net = torch.compile(self.net, backend="eager")

    module, callback = Compiled(), stopping(tmp_path, in_directory)
    fit(module, callback, max_epochs=3)
    assert same(weights(module), module.seen[0])
    other = Scripted()
    callback.restore_best_(other)
    assert same(weights(other), {name.replace("_orig_mod.", ""): t for name, t in module.seen[0].items()})


@each_place
def test_restoring_again_when_the_module_was_changed_since(in_directory: bool, tmp_path: Path) -> None:
    """Warn if the best is in memory, since the module then held its only copy; a directory holds another."""
    module, callback = Scripted(WORSE), stopping(tmp_path, in_directory)
    fit(module, callback, max_epochs=3)
    callback.restore_best_(module)  # neither changes the module nor warns
    with torch.no_grad():
        module.net[0].weight.zero_()
    if in_directory:
        callback.restore_best_(module)
        assert same(weights(module), module.seen[0])
    else:
        with pytest.warns(
            UserWarning, match=r"holds the best weights .*\['net.0.weight'\] have been changed .*dirpath"
        ):
            callback.restore_best_(module)


@each_place
def test_into_another_module_what_fits_is_copied(in_directory: bool, tmp_path: Path) -> None:
    module, callback = Buffered(bank=torch.ones(2)), stopping(tmp_path, in_directory)
    fit(module, callback, max_epochs=3)
    other = Scripted()
    with pytest.warns(UserWarning, match=r"no longer in the module: \['bank'\]"):
        callback.restore_best_(other)
    assert same(weights(other) | {"bank": module.bank}, module.seen[0])


def test_a_rename_that_was_killed_leaves_the_new_one(tmp_path: Path) -> None:
    module, callback = Scripted(WORSE), stopping(tmp_path, True)
    fit(module, callback, max_epochs=3)
    os.rename(callback.best_path, f"{callback.best_path}.new")
    other = Scripted()
    callback.restore_best_(other)
    assert same(weights(other), module.seen[0])


class _Late(TorchCheckpointIO):
    """Simulate a slow disk that is full in the end."""

    def __init__(self, room: int) -> None:
        self.room = room

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        time.sleep(0.05)
        self.room -= 1
        if self.room < 0:
            Path(path).write_bytes(b"half of")
            raise OSError("no space left")
        super().save_checkpoint(checkpoint, path, storage_options)


def test_under_asynchronous_writing(tmp_path: Path) -> None:
    """Rename a checkpoint when it is complete; an incomplete one never replaces an earlier best."""
    module, callback = Scripted([3.0, 2.0, 1.0]), stopping(tmp_path, True)
    fit(module, callback, plugins=[AsyncCheckpointIO(_Late(3))], max_epochs=3)
    assert os.listdir(tmp_path / "best") == ["best.ckpt"]
    assert same(weights(module), module.seen[2])
    module, callback = Scripted([3.0, 2.0, 1.0]), EarlyStopping("val_loss", dirpath=str(tmp_path / "full"))
    with pytest.raises(OSError, match="no space left"):
        fit(module, callback, plugins=[AsyncCheckpointIO(_Late(1))], max_epochs=3)
    callback.restore_best_(module)
    assert same(weights(module), module.seen[0])


def test_a_copy_from_disk_that_fails_halfway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Scripted):
        def on_train_end(self) -> None:
            copied: list[Any] = []

            def copy_(target: Tensor, source: Tensor) -> None:
                copied.append(target.copy_(source))
                if len(copied) == 2:
                    raise RuntimeError("a broken disk")

            monkeypatch.setattr("lightning_optim.base.shards.copy_", copy_)

    module = Failing(WORSE)
    with pytest.warns(UserWarning, match="keeps its last weights.*a broken disk"):
        fit(module, stopping(tmp_path, True), max_epochs=3)
    assert same(weights(module), module.seen[2])


def test_nothing_to_restore() -> None:
    callback = EarlyStopping("val_loss")
    with pytest.raises(RuntimeError, match="There are no best weights"):
        callback.restore_best_(Scripted())
    module = Scripted(WORSE)
    fit(module, EarlyStopping("val_loss", restore_best=False), max_epochs=3)
    assert same(weights(module), module.seen[2])


def test_an_interrupt_waits_until_the_best_is_whole(tmp_path: Path) -> None:
    import signal

    module, callback = Scripted(WORSE), EarlyStopping("val_loss")
    whole = best_weights.swap_

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_weights, "swap_", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(module, callback, max_epochs=3)
    assert same(weights(module), module.seen[0])


@pytest.mark.parametrize("kind", [Path, str])
def test_a_directory_may_be_a_path_or_the_current_one(kind: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in ("best", "best/", ""):
        module = Scripted([3.0, 2.0, 1.0])
        fit(module, callback := EarlyStopping("val_loss", dirpath=kind(directory)), max_epochs=3)
        assert same(weights(module), module.seen[2])
        os.remove(callback.best_path)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("directory", [3, True, b"best", ["best"]], ids=str)
def test_a_dirpath_that_is_no_path_is_refused(directory: Any) -> None:
    with pytest.raises(ValueError, match=r"`dirpath=.*` must be the path of a directory, or None for"):
        EarlyStopping("val_loss", dirpath=directory)
