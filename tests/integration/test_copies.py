"""Callbacks that are pickled, copied and printed: before, within and after a fit."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.base.construction import Constructed
from tests.harness.cells import Cell
from tests.integration.entry_fits import (
    CELL,
    assert_same,
    differences,
    each_entry,
    each_entry_by,
    each_slot,
    fit,
    prepare,
    reference_fit,
    states,
)
from tests.registry import Entry, fourth_powers

COPIES = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "deepcopy": copy.deepcopy}


class Copying:
    """Trait: copy the callbacks when the first epoch ends, in the middle of the fit."""

    def on_train_epoch_end(self: Any) -> None:
        if self.trainer.current_epoch == 0:
            ours = [callback for callback in self.trainer.callbacks if hasattr(callback, "steps")]
            self.copies = {how: make(ours) for how, make in COPIES.items()}
            self.then = states(ours)


@each_entry_by("how", *COPIES)
def test_a_copy_does_the_same(entry: Entry, how: str) -> None:
    callbacks = entry.all_callbacks(CELL)
    copies = COPIES[how](callbacks)
    assert_same(fit(entry, callbacks=copies), reference_fit(entry))
    assert_same(fit(entry, callbacks=callbacks), reference_fit(entry))


@each_entry
def test_a_copy_within_the_fit(entry: Entry) -> None:
    """The copy has the state of that moment, does not change with the fit, and does not disturb it."""
    fitted = fit(entry, CELL, Copying)
    assert_same(fitted, reference_fit(entry))
    for copies in fitted.module.copies.values():
        assert not differences(states(copies), fitted.module.then)
        assert all(one.fit is None for one in copies)
        assert_same(fit(entry, callbacks=copies), reference_fit(entry))


@each_entry_by("how", *COPIES)
def test_a_copy_after_the_fit(entry: Entry, how: str) -> None:
    fitted = fit(entry)
    copies = COPIES[how](fitted.ours)
    assert not differences(states(copies), states(fitted.ours))
    assert not shared(states_live(copies), states_live(fitted.ours)), "a copy holds the original's tensors"


@each_slot
def test_a_copy_takes_no_model_with_it(entry: Entry) -> None:
    """Lightning sets the module's `log` in each callback, so that a pickle would contain the whole module."""
    fitted = fit(entry, CELL, Unpicklable)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(fitted.module)
    assert not differences(states(pickle.loads(pickle.dumps(fitted.ours))), states(fitted.ours))


class Unpicklable:
    def __reduce_ex__(self, *_: Any) -> Any:
        raise TypeError("this module cannot be pickled")


@each_entry
def test_repr(entry: Entry) -> None:
    """`repr` is one line that begins with the class, the same in each process, before and after a fit."""
    before = [repr(callback) for callback in prepare(entry).ours]
    assert before == [repr(callback) for callback in reference_fit(entry).ours]
    for callback, text in zip(reference_fit(entry).ours, before, strict=True):
        assert text.startswith(type(callback).__name__)
        assert "\n" not in text
        assert not re.search(r" at 0x|object at", text)
        known = {**constructed(), "torch": torch, "nn": nn, "fourth_powers": fourth_powers}
        assert repr(eval(text, known)) == text


def constructed(kind: type = Constructed) -> dict[str, type]:
    """Return all classes whose objects print as calls, by name."""
    found = {kind.__name__: kind}
    for derived in kind.__subclasses__():
        found |= constructed(derived)
    return found


@each_slot
def test_the_key_does_not_depend_on_the_run(entry: Entry) -> None:
    """The state in a checkpoint is found although optimization, precision or accumulation have changed."""
    keys = [{callback.state_key for callback in prepare(entry, cell).ours} for cell in (CELL, TWO)]
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(prepare(entry).ours), "two callbacks of one key"


TWO = Cell("two", "bf16-mixed", "single", "4")


def states_live(callbacks: list[Any]) -> list[Tensor]:
    return [tensor for callback in callbacks for tensor in _tensors(callback.state_dict())]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def shared(some: list[Tensor], others: list[Tensor]) -> set[int]:
    return {t.data_ptr() for t in some if t.numel()} & {t.data_ptr() for t in others if t.numel()}


@each_entry
def test_state_is_plain(entry: Entry, tmp_path: Any) -> None:
    """The state holds tensors and plain values alone, so that `weights_only=True` can read it."""
    torch.save(reference_fit(entry).states, tmp_path / "states.pt")
    loaded = torch.load(tmp_path / "states.pt", weights_only=True)
    assert not differences(loaded, reference_fit(entry).states)
