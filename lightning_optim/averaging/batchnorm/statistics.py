"""Estimate the running statistics of BatchNorm by forward passes, pooled exactly over batches and ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_optim.base import shards
from lightning_optim.base.dtypes import accumulation_dtype, widest_dtype
from lightning_optim.base.layer_classes import BatchNormBase

Write: TypeAlias = Callable[[BatchNormBase, Tensor, Tensor], None]
"""A function of a layer, its new running mean and its new running variance."""


class _Moments:
    r"""Count, mean and sum of squared deviations of all values of each channel, merged with Chan's rule.

    With :math:`d = m_2 - m_1`: :math:`m = m_1 + d\, n_2 / n` and :math:`M = M_1 + M_2 + d^2 n_1 n_2 / n`. A mean of the
    variances of batches would ignore the differences between their means, and weight short batches like long ones.
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

    def add_batch(self, values: Tensor) -> int:
        """Add the values of a batch, of shape (N, C, …); return the number of values of each channel."""
        count = values.numel() // max(1, values.shape[1])
        dims = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values.detach().to(accumulation_dtype(values.dtype)), dims, correction=0)
        wide = widest_dtype(values.device)
        self.add(count, mean.to(wide), variance.to(wide) * count)
        return count

    @property
    def known(self) -> bool:
        """True if there is a variance, which takes two values."""
        return self.count > 1

    def write_(self, layer: BatchNormBase, write: Write) -> None:
        """Write the mean and the unbiased variance, as torch keeps it."""
        assert self.mean is not None and self.squares is not None
        write(layer, self.mean, self.squares / (self.count - 1))


@torch.no_grad()
def set_statistics_(layer: BatchNormBase, mean: Tensor, variance: Tensor) -> None:
    """Set the running mean and variance of a layer."""
    assert layer.running_mean is not None and layer.running_var is not None
    shards.copy_(layer.running_mean, mean)
    shards.copy_(layer.running_var, variance)


def statistics_layers(module: nn.Module) -> list[BatchNormBase]:
    """Return the BatchNorm layers of a model (1d, 2d, 3d, synchronized) that keep running statistics."""
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
    r"""Set the running statistics of BatchNorm to those of the model's present weights on these batches.

    The statistics of a model whose weights were averaged belong to other weights. This runs the model forward in eval
    mode, except that BatchNorm normalizes by the batch, and sets each channel to the mean and the unbiased variance of
    all its values, :math:`\frac1n \sum_i x_i` and :math:`\frac{1}{n-1} \sum_i (x_i - \bar x)^2`, accumulated in fp64
    (fp32 on MPS) over batches of any size (`arXiv:2105.07576 <https://arxiv.org/abs/2105.07576>`_, where one to ten
    thousand samples suffice). Modes, momenta and ``num_batches_tracked`` do not change.

    Args:
        module: The model. Compiled parts run uncompiled.
        batches: The batches. Shuffle them, since a layer's inputs depend on the batch that layers before it saw.
        forward: Function that runs the model on a batch. Default: ``module(batch)``, or ``module(batch[0])`` for a
            tuple or list.
        layers: The layers to refresh. Default: all that keep running statistics.
        group: Process group to pool over. All of its ranks must call this function.

    Returns:
        The number of batches on this rank. A layer that saw fewer than two values per channel is left unchanged.

    Raises:
        Exception: Any error of ``forward``. No statistics have changed then.

    Example::

        >>> layer = nn.BatchNorm1d(1)
        >>> refresh_batchnorm_(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])])
        2
        >>> layer.running_mean, layer.running_var
        (tensor([2.]), tensor([4.]))

    In a ``Trainer``, ``WeightAveraging(SWA(), every="epoch")`` does this before each use of the average.
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
        runs: Functions that run the model on a batch. When one fails, the next is used from this batch on.
        layers: The layers.

    Raises:
        Exception: The error of the last function.
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
                        vars(seen).update(vars(known))  # without the values that were added before the error
            count += 1
    return moments, count


def write_(
    layers: Sequence[BatchNormBase],
    moments: list[_Moments],
    group: dist.ProcessGroup | None,
    write: Write | None = None,
) -> None:
    """Pool moments over the ranks of ``group``, and set the statistics of the layers to them.

    Args:
        layers: The layers.
        moments: The moments of each layer.
        group: The process group; ``None`` for one process.
        write: Function that gets each layer with its new mean and variance. Default: set them in the layer.
    """
    if group is not None:
        moments = _over_ranks(layers, moments, group)
    for layer, seen in zip(layers, moments, strict=True):
        if seen.known:
            seen.write_(layer, write or set_statistics_)


@contextlib.contextmanager
def _collecting(module: nn.Module, layers: Sequence[BatchNormBase], moments: list[_Moments]) -> Iterator[None]:
    """Context manager: layers normalize by the batch and collect moments; afterwards modes and buffers are restored."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(layer, layer.running_mean, layer.running_var, layer.track_running_stats) for layer in layers]
    module.eval()
    with contextlib.ExitStack() as hooks:
        try:
            for layer, seen in zip(layers, moments, strict=True):
                hooks.callback(layer.register_forward_pre_hook(_CollectMoments(seen)).remove)
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            for layer, mean, variance, tracks in buffers:
                layer.running_mean, layer.running_var, layer.track_running_stats = mean, variance, tracks


class _CollectMoments:
    """Collect the moments of a layer's input before each forward, and let the layer normalize by the batch."""

    def __init__(self, moments: _Moments) -> None:
        self.moments = moments

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BatchNormBase)
        single = self.moments.add_batch(inputs[0]) == 1
        # In training mode without tracking torch normalizes by the batch and writes to no buffer. It refuses a batch
        # with one value per channel: that one is normalized by the statistics so far, in separate buffers.
        layer.training, layer.track_running_stats = not single, single
        if single and self.moments.known:
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean = torch.empty_like(layer.running_mean)
            layer.running_var = torch.empty_like(layer.running_var)
            self.moments.write_(layer, set_statistics_)


def _over_ranks(layers: Sequence[BatchNormBase], moments: list[_Moments], group: dist.ProcessGroup) -> list[_Moments]:
    """Merge the moments of all ranks in rank order, so that the result is the same on every rank."""
    if not layers:
        return moments
    sizes = [layer.num_features for layer in layers]
    wide = widest_dtype(layers[0].running_mean.device)  # type: ignore[union-attr]
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
