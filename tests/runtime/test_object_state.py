"""Test that everything that a module holds is put back, in the same objects."""

from __future__ import annotations

import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from lightning_optim.runtime.object_state import ObjectState


class Dictionary(dict):
    """Count writes to attributes within the methods."""

    writes = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.writes += 1
        super().__setitem__(key, value)


class Averager:
    """Averages values, as the meters of many projects do, and holds the module too."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.sums, self.last, self.formatted = module, [0.0, 0], None, str

    def add(self, value: float) -> None:
        self.sums[0] += value
        self.sums[1] += 1
        self.last = value


class Gone:
    pass


class Rows(Dataset):
    def __init__(self) -> None:
        self.cache: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        return self.cache.setdefault(index, index)


def _module() -> Any:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.list, module.tuple, module.deque = [1, [2], torch.zeros(2)], (torch.ones(2), [3]), deque([1, 2], maxlen=2)
    module.ordered, module.default, module.counts = OrderedDict(a=1, b=2), defaultdict(list, a=[1]), Counter("aab")
    module.own, module.set, module.bytes = Dictionary(a=1), {1, 2}, bytearray(b"ab")
    module.space, module.meter, module.array = types.SimpleNamespace(n=1), Averager(module), numpy.arange(3.0)
    module.number, module.text, module.nothing = 1, "a", None
    return module


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m[0].weight.data.add_(1.0),
    "data": lambda m: setattr(m[0].weight, "data", torch.ones(3, 5)),
    "another parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2))),
    "no parameter": lambda m: setattr(m[0], "bias", None),
    "another submodule": lambda m: m.append(nn.Linear(2, 2)),
    "no submodule": lambda m: m.pop(1),
    "another buffer": lambda m: m.register_buffer("late", torch.ones(1)),
    "a buffer that grows": lambda m: setattr(m[1], "running_mean", torch.ones(5)),
    "a buffer that is resized": lambda m: m[1].running_mean.resize_(7),
    "requires_grad": lambda m: m.requires_grad_(False),
    "modes": lambda m: m[1].eval(),
    "gradients": lambda m: m(torch.randn(3, 2)).sum().backward(),
    "a hook": lambda m: m[0].register_forward_hook(print),
    "list": lambda m: (m.list.append(2), m.list[1].append(3), m.list[2].add_(1.0), m.list.reverse()),
    "tuple": lambda m: (m.tuple[0].add_(1.0), m.tuple[1].clear()),
    "deque": lambda m: m.deque.append(3),
    "ordered": lambda m: m.ordered.move_to_end("a"),
    "default": lambda m: (m.default["b"].append(1), m.default["a"].append(1)),
    "counts": lambda m: m.counts.update("ab"),
    "own": lambda m: m.own.update(a=2, b=3),
    "set": lambda m: m.set.add(3),
    "bytes": lambda m: m.bytes.extend(b"c"),
    "space": lambda m: setattr(m.space, "n", 2),
    "meter": lambda m: m.meter.add(1.0),
    "array": lambda m: m.array.__iadd__(1.0),
    "numbers": lambda m: (
        setattr(m, "number", 2),
        setattr(m, "text", "b"),
        delattr(m, "nothing"),
        setattr(m, "new", 1),
    ),
}


def _seen(module: Any) -> str:
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "meter"}
    tensors = {name: (id(t), t.tolist(), t.requires_grad) for name, t in module.state_dict(keep_vars=True).items()}
    grads = [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in module.parameters()]
    meter = {name: value for name, value in vars(module.meter).items() if name != "module"}
    rest = [m.training for m in module.modules()], len(module[0]._forward_hooks), module.own.writes
    return repr((own, tensors, grads, meter, list(module.named_children()), rest, [id(v) for v in own.values()]))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_put_back(change: Callable[[Any], Any]) -> None:
    module = _module()
    module(torch.randn(3, 2)).square().sum().backward()
    before = _seen(module)
    state = ObjectState({"self": module})
    state.set_gradients_aside()
    assert all(p.grad is None for p in module.parameters())
    for _ in range(2):
        change(module)
        assert state.restore_() == []
    state.return_gradients()
    assert _seen(module) == before


def test_attributes_may_be_deep() -> None:
    module: Any = nn.Linear(1, 1)
    module.chain, module.links = types.SimpleNamespace(next=None, value=0), []
    for value in range(3000):
        module.chain, module.links = types.SimpleNamespace(next=module.chain, value=value), [module.links]
    state = ObjectState({"self": module})
    last = module.chain
    while last.next is not None:
        last = last.next
    last.value = 1
    assert state.restore_() == [] and last.value == 0


def test_a_graph_from_before_is_still_good() -> None:
    module = nn.Linear(2, 2)
    loss = module(torch.randn(3, 2)).square().sum()
    state = ObjectState({"self": module})
    state.set_gradients_aside()
    module.weight.data.add_(1.0)
    state.restore_()
    state.return_gradients()
    loss.backward()
    assert module.weight.grad is not None


def test_what_lies_in_libraries_files_and_the_dead_is_left_alone(tmp_path: Path) -> None:
    module: Any = nn.Linear(2, 2)
    numpy.save(tmp_path / "rows.npy", numpy.zeros(3))
    module.rows, module.dataset = numpy.load(tmp_path / "rows.npy", mmap_mode="r+"), Rows()
    module.__dict__["dead"] = weakref.proxy(Gone())
    module.expanded, module.sparse = torch.ones(1).expand(3), torch.eye(2).to_sparse()
    module.meta, module.many = torch.empty(2, device="meta"), list(range(10**5))
    with torch.inference_mode():
        module.inferred = torch.ones(2)
    module.scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    scripted = module.scripted.weight.clone()
    state = ObjectState({"self": module})
    module.rows[0] = 1.0
    assert module.dataset[3] == 3
    module.scripted.weight.data.add_(1.0)
    assert state.restore_() == []
    assert module.rows[0] == 1.0 and module.dataset.cache == {3: 3}
    assert torch.equal(module.scripted.weight, scripted)
    module.expanded.data = torch.zeros(3)
    assert state.restore_() == [] and module.expanded.tolist() == [1.0] * 3


def test_what_cannot_be_put_back_is_named() -> None:
    class Connection:
        def __init__(self) -> None:
            self.lock, self.sent, self.queue = threading.Lock(), 0, []

    module: Any = nn.Sequential(nn.Linear(2, 2))
    module[0].connection, module.names = Connection(), {"all": [iter("abc")]}
    module.sparse = torch.eye(2).to_sparse()
    letters = module.names["all"][0]
    state = ObjectState({"self": module})
    state.watch()
    assert state.restore_() == []
    module[0].connection.queue.append(1)
    assert state.restore_() == ["self.0.connection (Connection)"]
    module[0].connection.queue.clear()
    state.watch()
    assert [letter for letter in module.names["all"][0]] == ["a", "b", "c"]
    module.sparse.zero_()
    assert sorted(state.restore_()) == ["self.names['all'][0]", "self.sparse"]
    assert module.names["all"][0] is letters


def test_copies_of_tensors_are_kept_on_the_device_that_is_asked_for() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    state = ObjectState({"self": module}, device="meta")  # where nothing can be copied back from
    with pytest.raises(NotImplementedError, match="meta"):
        state.restore_()
    assert torch.equal(module.weight, before)
