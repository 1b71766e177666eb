"""Selection of parameters, local shards, swaps and copies: on shards as on whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_optim.base import foreach, selection, shards
from lightning_optim.base.dtypes import accumulation_dtype
from tests.harness.process_group import Group


class Model(nn.Module):
    """An embedding that is tied to the head, normalization, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 4)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 2, bias=False).requires_grad_(False)


@pytest.mark.parametrize(
    ("on", "exclude", "names"),
    [
        (None, None, ["embed.weight", "encoder.0.weight", "frozen.weight"]),
        ("encoder.*", None, ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"]),
        ("*.bias", None, ["encoder.0.bias", "encoder.1.bias", "head.bias"]),
        (["*.bias", "frozen.*"], "encoder.1.*", ["encoder.0.bias", "head.bias", "frozen.weight"]),
        (nn.LayerNorm, None, ["encoder.1.weight", "encoder.1.bias"]),
        (nn.Linear, "*.bias", ["embed.weight", "encoder.0.weight", "frozen.weight"]),
        (None, nn.Embedding, ["encoder.0.weight", "frozen.weight"]),
        (None, ["embed.*", nn.Linear], []),
        (lambda name, p: p.ndim == 1, lambda name, p: name.startswith("encoder"), ["head.bias"]),
        ("head.weight", None, ["head.weight"]),
        (lambda name, p: False, None, []),
    ],
)
def test_select(on: object, exclude: object, names: list[str]) -> None:
    model = Model()
    chosen = selection.select(model, on, exclude)
    assert list(chosen) == names
    assert all(parameter is model.get_parameter(name) for name, parameter in chosen.items())


def test_select_takes_everything_once() -> None:
    model = Model()
    chosen = selection.select(model, "*")
    assert [id(p) for p in chosen.values()] == [id(p) for p in model.parameters()]


def test_select_names_a_compiled_module_as_it_was_written() -> None:
    compiled = nn.Module()  # what `torch.compile` returns holds the module under this name
    compiled.add_module("_orig_mod", nn.Linear(2, 2))
    assert list(selection.select(compiled, "*")) == ["weight", "bias"]
    assert list(selection.select(nn.Sequential(compiled), "0.weight")) == ["0.weight"]


def test_stacked_members_do_not_count_as_a_dimension() -> None:
    model = nn.Module()
    model.weight, model.bias = nn.Parameter(torch.zeros(5, 3, 2)), nn.Parameter(torch.zeros(5, 3))
    model.weight.member_dim = model.bias.member_dim = 0
    assert list(selection.select(model)) == ["weight"]


@pytest.mark.parametrize(
    ("on", "exclude", "sentence"),
    [
        (
            "encodr.0.weight",
            None,
            r"`on='encodr.0.weight'` matches no parameter of Model; did you mean 'encoder.0.weight'\? Its",
        ),
        (None, "heads.bias", r"`exclude='heads.bias'` matches no .*; did you mean 'head.bias'\? Its parameters: '"),
        (nn.Conv2d, None, r"`on='Conv2d'` matches no parameter of Model\. Its modules: .*'Linear'"),
        (["*.bias", "nothing"], None, r"`on='nothing'` matches no parameter of Model\. Its parameters: '"),
        ("encodr.*", None, r"`on='encodr\.\*'` matches no parameter of Model; did you mean 'encoder\.\*'\?"),
        ("encoder", None, r"`on='encoder'` matches no parameter of Model; did you mean 'encoder\.\*'\?"),
        ([], None, r"`on` must be a glob .* a list of one or more of these or None, got \[\]"),
        ((), None, r"`on` must be a glob .* got \(\)"),
    ],
)
def test_select_refuses_what_matches_nothing(on: object, exclude: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        selection.select(Model(), on, exclude)


def test_local_shards_are_live_storage() -> None:
    tensor = torch.zeros(2)
    (part,) = shards.local_shards([tensor])
    part.fill_(1.0)
    assert tensor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (1100, 1000)])
def test_swap_keeps_storage(shape: tuple[int, ...]) -> None:
    left, right = torch.randn(shape), torch.randn(shape)
    wanted, pointers = (right.clone(), left.clone()), (left.data_ptr(), right.data_ptr())
    foreach.swap_(left, right)
    assert torch.equal(left, wanted[0])
    assert torch.equal(right, wanted[1])
    assert (left.data_ptr(), right.data_ptr()) == pointers


def test_swap_of_a_large_tensor_in_another_memory_format_is_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (torch.randn(2, 64, 64, 33).to(memory_format=torch.channels_last) for _ in range(2))
    wanted = right.clone(), left.clone()
    pieces: list[int] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: pieces.append(tensor.numel()) or clone(tensor))
    foreach.swap_(left, right)
    assert torch.equal(left, wanted[0])
    assert torch.equal(right, wanted[1])
    assert max(pieces) == 1 << 18 < left.numel()


def test_swap_of_views_leaves_their_neighbours() -> None:
    left, right = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(3, 2)
    foreach.swap_(left[:, 0], right[1:, 1])
    assert left.tolist() == [[9.0, 1.0, 2.0], [11.0, 4.0, 5.0]]
    assert right.tolist() == [[6.0, 7.0], [8.0, 0.0], [10.0, 3.0]]


def test_copy_goes_into_a_parameter_and_converts() -> None:
    target, source = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)), torch.tensor([1.0, 2.0, 3.0])
    pointer = target.data_ptr()
    shards.copy_(target, source)
    assert target.tolist() == [1.0, 2.0, 3.0]
    assert target.data_ptr() == pointer


def test_gathered_tensor_is_a_copy() -> None:
    tensor = nn.Parameter(torch.ones(2))
    copied = shards.gather_to_cpu(tensor)
    copied.zero_()
    assert tensor.tolist() == [1.0, 1.0]
    assert not copied.requires_grad


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_accumulation_dtype(dtype: torch.dtype, kept: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == kept


def test_reshard_leaves_a_plain_module_alone() -> None:
    model = nn.Linear(2, 2)
    before = [p.clone() for p in model.parameters()]
    shards.reshard_(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ---- on two processes: five rows are shards of three and two, one row leaves the second rank an empty shard ----


def _placements_after_alignment() -> tuple[list[str], list[float], bool]:
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    aligned = shards.align_grad_(parameter)
    return [str(p) for p in aligned.placements], aligned.to_local().tolist(), aligned is parameter.grad


def test_align_grad_sums_what_is_partial(group: Group) -> None:
    assert group.run(_placements_after_alignment) == [(["R"], [2.0] * 4, True)] * 2


def test_align_grad_leaves_what_is_aligned() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert shards.align_grad_(parameter) is None
    parameter.grad = torch.ones(2)
    assert shards.align_grad_(parameter) is parameter.grad


def _copied_and_gathered() -> list[bool]:
    mesh = init_device_mesh("cpu", (2,))
    right = []
    for whole in (torch.arange(15.0).view(5, 3), torch.tensor([4.0])):
        for placement in (Shard(0), Replicate()):
            target = distribute_tensor(torch.zeros_like(whole), mesh, [placement])
            pointer = target.to_local().data_ptr()
            shards.copy_(target, whole)
            right.append(torch.equal(shards.gather_to_cpu(target), whole) and target.to_local().data_ptr() == pointer)
            shards.copy_(target, distribute_tensor(whole + 1.0, mesh, [placement]))
            right.append(torch.equal(shards.gather_to_cpu(target), whole + 1.0))
            again = shards.placed_as(target.to_local().clone(), target)
            right.append(
                torch.equal(shards.gather_to_cpu(again), whole + 1.0) and again.placements == target.placements
            )
            shards.gather_to_cpu(target).zero_()
            right.append(torch.equal(shards.gather_to_cpu(target), whole + 1.0))
    return right


def test_copies_into_shards_and_out_of_them(group: Group) -> None:
    assert group.run(_copied_and_gathered) == [[True] * 16] * 2


def test_exclude_takes_a_tied_parameter_out_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(selection.select(model, exclude="0.*")) == []
    assert list(selection.select(model, exclude="1.*")) == []
