"""Statistics of BatchNorm, estimated anew by a forward pass: pooled exactly, over batches of any size and ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_optim.base import foreach, shards
from lightning_optim.base.layer_classes import BatchNormBase

Write: TypeAlias = Callable[[BatchNormBase, Tensor, Tensor], None]
"""Takes the running mean and the running variance of a layer."""


class _Moments:
    r"""Count, mean and squared deviations of all values of each channel, merged batch by batch with Chan's rule.

    With :math:`d = m_2 - m_1`: :math:`m = m_1 + d\, n_2 / n` and :math:`M = M_1 + M_2 + d^2 n_1 n_2 / n`. A mean of the
    batches' variances would leave out how far the batches' means lie apart, and count a short batch like a long one.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        apart = mean - self.mean
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + squares + apart.square() * (self.count * count / total)
        self.count = total

    def take_in(self, values: Tensor) -> int:
        """Add the values of a batch, of shape (N, C, …); return how many each channel got."""
        count = values.numel() // max(1, values.shape[1])
        dims = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values.detach().to(foreach.accumulation_dtype(values)), dims, correction=0)
        wide = foreach.widest_dtype(values.device)
        self.add(count, mean.to(wide), variance.to(wide) * count)
        return count

    @property
    def known(self) -> bool:
        """Whether there is a variance: it takes two values."""
        return self.count > 1

    def write_(self, layer: BatchNormBase, write: Write) -> None:
        """Hand over the mean and, unbiased as torch keeps it, the variance."""
        assert self.mean is not None and self.squares is not None
        write(layer, self.mean, self.squares / (self.count - 1))


@torch.no_grad()
def set_statistics_(layer: BatchNormBase, mean: Tensor, variance: Tensor) -> None:
    """Set the layer's running mean and variance."""
    assert layer.running_mean is not None and layer.running_var is not None
    shards.copy_(layer.running_mean, mean)
    shards.copy_(layer.running_var, variance)


def statistics_layers(module: nn.Module) -> list[BatchNormBase]:
    """The BatchNorm layers of a model (1d, 2d, 3d, synchronized) that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, BatchNormBase) and m.running_mean is not None]


@torch.no_grad()
def refresh_batchnorm_(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any] | None = None,
    *,
    layers: Sequence[BatchNormBase] | None = None,
    group: dist.ProcessGroup | None = None,
) -> int:
    r"""Set the running statistics of BatchNorm to those of the present weights on these batches.

    After weights were averaged, the statistics in the model are those of other weights. This runs the model forward,
    with BatchNorm normalizing by each batch and everything else in eval mode, and pools mean and variance of all values
    exactly, whatever the batches' sizes (arXiv:2105.07576, where a thousand to ten thousand samples suffice). No
    layer's mode, momentum or number of batches changes. Use shuffled batches: a layer behind another sees what that one
    normalized by its batch.

    Args:
        module: The model. Compiled parts run uncompiled.
        batches: What the loader gives, as many as shall be seen.
        forward: Runs the model on a batch. Default: ``module(batch)``, with the first item of a tuple or list.
        layers: The layers to refresh. Default: all that keep running statistics.
        group: Pool over the ranks of this process group, each of which calls this.

    Returns:
        The number of batches on this rank. A layer that saw less than two values is left as it was.

    Example::

        >>> layer = nn.BatchNorm1d(1)
        >>> refresh_batchnorm_(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])])
        2
        >>> layer.running_mean, layer.running_var
        (tensor([2.]), tensor([4.]))
    """
    run = forward or (lambda batch: module(batch[0] if isinstance(batch, tuple | list) else batch))
    found = statistics_layers(module) if layers is None else list(layers)
    moments, count = collect(module, batches, [run], found)
    write_(found, moments, group)
    return count


@torch.no_grad()
def collect(
    module: nn.Module, batches: Iterable[Any], runs: Sequence[Callable[[Any], Any]], layers: Sequence[BatchNormBase]
) -> tuple[list[_Moments], int]:
    """Return the moments of each layer's inputs over these batches, and the number of batches on this rank.

    Args:
        module: The model; afterwards it is as before.
        batches: The batches.
        runs: Ways to run the model on a batch. From where one fails on, the next is taken.
        layers: The layers.

    Raises:
        Exception: That of the last way, if it fails too.
    """
    moments, count, left = [_Moments() for _ in layers], 0, list(runs[::-1])
    with _collecting(module, layers, moments), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            before = [copy.copy(seen) for seen in moments]
            while True:
                try:
                    left[-1](batch)
                    break
                except Exception:
                    if len(left) == 1:
                        raise
                    left.pop()
                    for seen, known in zip(moments, before, strict=True):
                        vars(seen).update(vars(known))  # without what the layers saw until it failed
            count += 1
    return moments, count


def write_(
    layers: Sequence[BatchNormBase],
    moments: list[_Moments],
    group: dist.ProcessGroup | None,
    write: Write | None = None,
) -> None:
    """Pool these moments over the ranks of ``group``, and set the layers' statistics to them.

    Args:
        layers: The layers.
        moments: Of each of them.
        group: The ranks; ``None`` for one process.
        write: Takes each layer's new mean and variance, in float64. Default: they are copied into the layer.
    """
    if group is not None:
        moments = _over_ranks(layers, moments, group)
    for layer, seen in zip(layers, moments, strict=True):
        if seen.known:
            seen.write_(layer, write or set_statistics_)


@contextlib.contextmanager
def _collecting(module: nn.Module, layers: Sequence[BatchNormBase], moments: list[_Moments]) -> Iterator[None]:
    """Let each layer normalize by its batch and tell its moments; put back every mode and buffer afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(layer, layer.running_mean, layer.running_var, layer.track_running_stats) for layer in layers]
    module.eval()
    with contextlib.ExitStack() as hooks:
        try:
            for layer, seen in zip(layers, moments, strict=True):
                hooks.callback(layer.register_forward_pre_hook(_Listener(seen)).remove)
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for layer, mean, variance, tracks in buffers:
                layer.running_mean, layer.running_var, layer.track_running_stats = mean, variance, tracks


class _Listener:
    """Before a layer's forward: take in the values, and choose by what the layer normalizes."""

    def __init__(self, moments: _Moments) -> None:
        self.moments = moments

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BatchNormBase)
        single = self.moments.take_in(inputs[0]) == 1
        # In training mode without tracking torch normalizes by the batch and touches no buffer. One value per channel
        # has no variance, and torch refuses it: it is normalized by what is known so far, in buffers of its own.
        layer.training, layer.track_running_stats = not single, single
        if single and self.moments.known:
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean = torch.empty_like(layer.running_mean)
            layer.running_var = torch.empty_like(layer.running_var)
            self.moments.write_(layer, set_statistics_)


def _over_ranks(layers: Sequence[BatchNormBase], moments: list[_Moments], group: dist.ProcessGroup) -> list[_Moments]:
    """Merge the moments of all ranks, in the order of ranks, so that every rank has the same result."""
    if not layers:
        return moments
    sizes = [layer.num_features for layer in layers]
    wide = foreach.widest_dtype(layers[0].running_mean.device)  # type: ignore[union-attr]
    parts = []
    for layer, seen, size in zip(layers, moments, sizes, strict=True):
        nothing = torch.zeros(size, dtype=wide, device=layer.running_mean.device)  # type: ignore[union-attr]
        count = torch.full((1,), float(seen.count), dtype=wide, device=nothing.device)
        parts += [count, nothing if seen.mean is None else seen.mean, nothing if seen.squares is None else seen.squares]
    mine = torch.cat(parts)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    merged = [_Moments() for _ in layers]
    for theirs in everyone:
        pieces = iter(torch.split(theirs, [length for size in sizes for length in (1, size, size)]))
        for seen in merged:
            seen.add(int(next(pieces)), next(pieces), next(pieces))
    return merged
