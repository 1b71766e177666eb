"""Pure tensor work: choose parameters, work on local shards, copies between placements.

A model under FSDP2 or tensor parallelism holds :class:`~torch.distributed.tensor.DTensor` parameters, perhaps beside
plain ones. Element-wise formulas are applied to the local shards (:func:`local`); for what goes over several elements
see :mod:`lightning_optim.norms`.
"""

from __future__ import annotations

import difflib
import fnmatch
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Parameter], bool]

_CHUNK = 1 << 20  # elements of the temporary in `exchange_`: 4 MB in fp32, large enough to be bound by memory


def select(
    module: nn.Module,
    on: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    *,
    required: bool = True,
) -> dict[str, nn.Parameter]:
    """Choose parameters by name, by the type of the module that owns them, or by a predicate.

    Args:
        module: The model.
        on: A glob over parameter names (``"encoder.*"``; ``"*"`` is all), a module class (its own parameters), a
            predicate ``(name, parameter) -> bool``, or a list of these. ``None`` takes the parameters with two
            dimensions or more: weights of layers, and neither biases nor the scales of normalization layers.
        exclude: What to leave out, in the same terms.
        required: Whether each glob and each class must match something.

    Returns:
        Name to parameter in the model's order; a tied parameter once. Frozen parameters are in it: whoever acts on the
        result asks ``requires_grad`` when acting, since a model may be unfrozen during training.

    Raises:
        ValueError: If a glob or a class matches nothing; the message names what comes near.

    Example::

        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> list(select(model))
        ['0.weight']
        >>> list(select(model, on="*", exclude=nn.LayerNorm))
        ['0.weight', '0.bias']
    """
    named = {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}
    chosen = set(named) if on is None else _matches(module, named, on, "on", required)
    if on is None:
        chosen = {name for name in chosen if not is_lazy(named[name]) and dimensions(named[name]) >= 2}
    if exclude is not None:
        left_out = _matches(module, named, exclude, "exclude", required)
        out = {id(named[name]) for name in left_out}  # under any name of a tied one
        chosen = {name for name in chosen if id(named[name]) not in out}
    unique = {id(p): (name, p) for name, p in reversed(named.items()) if name in chosen}
    return {name: p for name, p in named.items() if unique.get(id(p), (None,))[0] == name}


def dimensions(parameter: Tensor) -> int:
    """The number of dimensions without the one that stacks ensemble members (``parameter.member_dim``), if any."""
    return parameter.ndim - (getattr(parameter, "member_dim", None) is not None)


def _matches(
    module: nn.Module,
    named: dict[str, nn.Parameter],
    selectors: Selector | Sequence[Selector],
    argument: str,
    required: bool,
) -> set[str]:
    found: set[str] = set()
    for selector in selectors if isinstance(selectors, Sequence) and not isinstance(selectors, str) else [selectors]:
        if isinstance(selector, str):
            hits = set(fnmatch.filter(named, selector))
            known = list(named)
        elif isinstance(selector, type):
            kind = _becomes(selector)
            owners = (m for m in module.modules() if isinstance(m, kind) or issubclass(_becomes(type(m)), kind))
            owned = {id(p) for owner in owners for p in owner.parameters(recurse=False)}
            hits = {name for name, p in named.items() if id(p) in owned}
            known = sorted({type(m).__name__ for m in module.modules()})
        else:
            found |= {name for name, p in named.items() if not is_lazy(p) and selector(name, p)}
            continue
        if required and not hits:
            text = selector if isinstance(selector, str) else selector.__name__
            near = difflib.get_close_matches(text, known, n=3, cutoff=0.3) or known[:3]
            raise ValueError(f"`{argument}={text!r}` matches no parameter of {type(module).__name__}; near: {near}")
        found |= hits
    return found


def _becomes(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a lazy class's modules after their first forward pass; any other class itself."""
    return (issubclass(kind, LazyModuleMixin) and kind.cls_to_become) or kind


class Selection:
    """Parameters that :func:`select` chooses, chosen again when lazy parameters have got their shape.

    :meth:`follow` also chooses again when parameters came that were not there before.

    Args:
        module: The model.
        on: As in :func:`select`.
        exclude: As in :func:`select`.

    Raises:
        ValueError: If a glob or a class matches nothing.

    Example::

        >>> model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
        >>> selection = Selection(model)
        >>> len(selection.ids), len(model(torch.zeros(1, 2))), len(selection.ids)
        (1, 1, 2)
    """

    def __init__(
        self,
        module: nn.Module,
        on: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
    ) -> None:
        self._module, self._on, self._exclude = module, on, exclude
        self._foreign: dict[int, Tensor] = {}  # what optimizers hold and the module does not
        self._choose(required=True)

    def _choose(self, required: bool = False) -> None:
        # A model may lose in the middle of a run what a glob matched at its start.
        chosen = select(self._module, self._on, self._exclude, required=required)
        self._seen = {id(parameter): parameter for parameter in self._module.parameters()}  # held: no id is used again
        self._known = self._seen.keys() | self._foreign.keys()
        self._waiting = [parameter for parameter in self._module.parameters() if is_lazy(parameter)]
        self._ids = {id(parameter) for parameter in chosen.values()}
        self._existing = self._ids - {id(parameter) for parameter in self._waiting}

    def follow(self, parameters: Sequence[Tensor]) -> bool:
        """Choose again if some of an optimizer's parameters are new to the module, such as those of a replaced head.

        Returns:
            Whether it did.
        """
        if self._known.issuperset(map(id, parameters)):
            return False
        reshard_(self._module)
        self._choose()
        self._foreign |= {id(tensor): tensor for tensor in parameters if id(tensor) not in self._known}
        self._known |= self._foreign.keys()
        return True

    @property
    def ids(self) -> set[int]:
        """The ``id`` of each chosen parameter."""
        self._renew()
        return self._ids

    @property
    def existing(self) -> set[int]:
        """The ``id`` of each chosen parameter that has a shape."""
        self._renew()
        return self._existing

    def _renew(self) -> None:
        if self._waiting and not all(map(is_lazy, self._waiting)):
            self._choose()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that this process holds, as live storage: a DTensor's shard, else the tensor itself."""
    listed = list(tensors)
    return [t.to_local() if isinstance(t, DTensor) else t for t in listed] if any_sharded(listed) else listed


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any is a DTensor. Of hundreds of small tensors, asking each would cost as much as the work on them."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def any_sparse(tensors: Iterable[Tensor]) -> bool:
    """Return whether any is a sparse gradient, such as ``Embedding(sparse=True)`` makes."""
    return True in map(operator.attrgetter("is_sparse"), tensors)


def opened(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and gradients for formulas that know dense tensors only: of a sparse gradient its values.

    Args:
        weights: The parameters.
        grads: Their gradients, in the same order; a sparse one is coalesced, as by
            :func:`~lightning_optim.gradients_of`.

    Returns:
        The same tensors, except that a sparse gradient is replaced by its values, in live storage, and its weight by a
        copy of the rows that have a gradient.
    """
    if not any_sparse(grads):
        return list(weights), list(grads)
    pairs = zip(weights, grads, strict=True)
    rows = [weight.detach()[tuple(grad.indices())] if grad.is_sparse else weight for weight, grad in pairs]
    return rows, [grad.values() if grad.is_sparse else grad for grad in grads]


def placed_as(shard: Tensor, like: Tensor) -> Tensor:
    """The tensor of which ``shard`` is this process's part, placed as ``like``; no communication."""
    if not isinstance(like, DTensor):
        return shard
    # Without shape and stride, torch takes shards to be of equal size, which uneven ones are not.
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def align_grad_(parameter: Tensor) -> Tensor | None:
    """Give ``parameter.grad`` the placement of its parameter, or coalesce it if it is sparse, and return it.

    Under sequence parallelism the gradient of a LayerNorm is ``Partial``: each rank holds a summand, and what is added
    to the local part would count once per rank. A sparse gradient may hold several summands for a row.
    """
    grad = parameter.grad
    if grad is not None and grad.is_sparse:
        parameter.grad = grad = grad.coalesce()
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad = grad.redistribute(placements=parameter.placements)
    return grad


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums and averages of ``tensor`` are kept: fp32 for half precision, else its own.

    In bf16 an average with a decay of 0.999 never moves, since its increments are below the last bit.
    """
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer of ``module`` under all its names in a plain ``state_dict()``.

    It does not call ``state_dict()``, which users override to leave frozen weights out of their checkpoints. Call
    :func:`reshard_` before. The tensors are live storage.
    """
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for key, buffer in owner._buffers.items():
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                named[f"{prefix}.{key}" if prefix else key] = buffer
    return named


def buffer_places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the plain name of each buffer, or of the place of one that is ``None``, its owner, and its key there."""
    for prefix, owner in module.named_modules():
        for key in owner._buffers:
            yield plain_name(f"{prefix}.{key}" if prefix else key), owner, key


def version(tensor: Tensor) -> int:
    """Return a number that grows when the tensor is written to in place; -1 for an inference tensor, which has none."""
    (shard,) = local([tensor])
    return -1 if shard.is_inference() else shard._version


def plain_name(name: str) -> str:
    """Return the name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


def writable_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return :func:`named_tensors` that can be written in place, by their plain names.

    Left out are expanded tensors, whose elements share memory, sparse ones, and lazy parameters without data.
    """
    return {plain_name(name): tensor for name, tensor in named_tensors(module).items() if is_writable(tensor)}


def is_writable(tensor: Tensor) -> bool:
    """Return whether a tensor can be written in place: no two of its elements share memory, and it has data."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return False
    return all(stride or size <= 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def frozen_names(module: nn.Module) -> set[str]:
    """Return the plain names of what no optimizer moves.

    These are parameters that require no gradient, and the buffers of submodules in which no parameter requires one.
    """
    trained = {
        prefix
        for prefix, owner in module.named_modules(remove_duplicate=False)
        if any(parameter.requires_grad for parameter in owner.parameters())
    }
    named = named_tensors(module).items()
    return {
        plain_name(name)
        for name, tensor in named
        if not (tensor.requires_grad if isinstance(tensor, nn.Parameter) else name.rpartition(".")[0] in trained)
    }


def parameter_names(module: nn.Module) -> dict[int, str]:
    """Map the ``id`` of each parameter and persistent buffer to its first name. Call :func:`reshard_` before."""
    return {id(tensor): name for name, tensor in reversed(named_tensors(module).items())}


def reshard_(module: nn.Module) -> None:
    """Put every FSDP2 module back to its shards.

    After a forward without a backward (validation) the root group is still gathered: the next training step would run
    on what was gathered, whatever is written into the shards. A module without FSDP2 is left alone.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


@torch.no_grad()
def copy_(target: Tensor, source: Tensor) -> None:
    """Copy ``source`` into ``target`` in place, whole tensors into shards too.

    Args:
        target: A plain tensor or a DTensor.
        source: A tensor of the same global shape, of any dtype and device: a DTensor of the target's placement, or the
            whole tensor, of which each rank takes its part without communication.
    """
    if not isinstance(target, DTensor):
        target.copy_(source)
        return
    ours = target.to_local()
    ours.copy_(source.to_local() if isinstance(source, DTensor) else part_of(source.to(ours.device), target))


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds if it is placed as ``like``; no communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def chunks(left: list[Tensor], right: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Cut two lists into pieces of some MB, the size of a temporary: small tensors together, large ones in views.

    On a CPU a piece stays in the cache; on a GPU it is large enough to hide the launch of a kernel.
    """
    size = 1 << 18 if left and left[0].device.type == "cpu" else 1 << 22
    some_left: list[Tensor] = []
    some_right: list[Tensor] = []
    room = size
    for one, other in zip(left, right, strict=True):
        elements = one.numel()
        if elements > size and (flat := _flat(one, other)):
            views = (torch.split(tensor, size) for tensor in flat)
            yield from (([piece], [other_piece]) for piece, other_piece in zip(*views, strict=True))
            continue
        if elements > room and some_left:
            yield some_left, some_right
            some_left, some_right, room = [], [], size
        some_left.append(one)
        some_right.append(other)
        room -= elements
    if some_left:
        yield some_left, some_right


def _flat(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both as vectors, element by element, if they lie in one memory format without gaps, such as channels last."""
    order = sorted(range(one.ndim), key=one.stride, reverse=True)
    one, other = one.permute(order), other.permute(order)
    return (one.view(-1), other.view(-1)) if one.is_contiguous() and other.is_contiguous() else None


@torch.no_grad()
def exchange_(left: Tensor, right: Tensor) -> None:
    """Swap the values of two local tensors of one dtype, device and shape, with a temporary of a few MB at most."""
    flat = _flat(left, right)
    pairs = zip(*(torch.split(tensor, _CHUNK) for tensor in flat), strict=True) if flat else [(left, right)]
    for a, b in pairs:
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def whole(tensor: Tensor) -> Tensor:
    """Copy the whole tensor to the CPU. For a DTensor this is a collective: every rank of its mesh must call it."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()  # the live storage itself where it is replicated
    return tensor.to("cpu", copy=True)
