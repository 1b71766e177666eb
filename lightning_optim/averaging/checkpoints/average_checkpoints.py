"""Average the weights of several models or checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from torch import nn

from lightning_optim.averaging.checkpoints import reading
from lightning_optim.averaging.checkpoints.provenance import Provenance, provenance_of
from lightning_optim.averaging.checkpoints.running_mean import RunningMean, StateDict
from lightning_optim.runtime.files import safe_reading

PathLike: TypeAlias = str | os.PathLike[str]


def average_weights(
    models_or_state_dicts: Sequence[nn.Module | Mapping[str, Any]], weights: Sequence[float] | None = None
) -> StateDict:
    r"""Average the weights of several models: :math:`\sum_i w_i \theta_i / \sum_i w_i`.

    Floating-point and complex tensors are averaged in fp32, or in their own dtype if it is wider, and returned in their
    own dtype. Integers, bools and all other values are those of the last model. Tied weights stay tied. BatchNorm
    statistics are averaged like weights; :func:`refresh_batchnorm_` estimates better ones afterwards.

    The mean is good if the models are linearly mode-connected, that is if the loss is low everywhere between them: so
    are checkpoints of one run, and models that were fine-tuned from the same weights. Models trained from different
    initial weights are not, and their mean is useless.

    Args:
        models_or_state_dicts: Modules, or results of their ``state_dict()``. Values may be nested dictionaries.
        weights: The :math:`w_i`, numbers >= 0, not all zero. Default: equal.

    Returns:
        A ``state_dict`` for ``module.load_state_dict``.

    Raises:
        ValueError: If there are no models, their names or shapes differ, a tensor is sparse or nested, or ``weights``
            are not as many such numbers.

    Example::

        >>> one, other = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = [p.data.fill_(v) for model, v in ((one, 1.0), (other, 4.0)) for p in model.parameters()]
        >>> average_weights([one, other], weights=[2, 1])["weight"]
        tensor([[2.]])

    To average during a fit, see :class:`WeightAveraging` and :class:`CheckpointAveraging`.
    """
    items = list(models_or_state_dicts) if isinstance(models_or_state_dicts, Iterable) else [models_or_state_dicts]
    if wrong := [item for item in items if not isinstance(item, nn.Module | Mapping)]:
        raise ValueError(
            f"`models_or_state_dicts` must be a list of modules or state dicts, got a {type(wrong[0]).__name__} in it"
        )
    states = [item.state_dict() if isinstance(item, nn.Module) else item for item in items]
    mean = RunningMean()
    for index, (state, weight) in enumerate(zip(states, _checked(weights, len(states)), strict=True)):
        mean.add(state, weight, f"model {index}")
    return mean.result()


def average_checkpoints(
    paths: Sequence[PathLike],
    weights: Sequence[float] | None = None,
    *,
    key: str | None = None,
    weights_only: bool = True,
    progress: bool = False,
) -> StateDict:
    r"""Average the weights of several checkpoints, as :func:`average_weights` does with models.

    The checkpoints are read one after the other: whatever their number, memory is the mean in fp32 and one of them.
    They may be checkpoints of Lightning, other dictionaries, plain state dicts, ``.safetensors`` files (which takes
    ``pip install safetensors``) or folders of distributed checkpoints. The weights are looked for under ``state_dict``,
    where a run with :class:`WeightAveraging` has the averaged ones, then under ``model``, ``model_state_dict`` and
    ``ema``; otherwise the whole file is taken as a state dict. Nested dictionaries are averaged on all levels.

    Sizes and checksums of a file are checked before it is used, so that a damaged archive of ``torch.save`` raises an
    error and never yields other values. safetensors and the format of torch before 1.6 have no checksums; of these only
    damage to names, shapes and sizes is found.

    Args:
        paths: Paths of the checkpoints.
        weights: Weight of each checkpoint, numbers >= 0, not all zero. Default: equal.
        key: Name of the weights in each checkpoint, if it is another, or if there are several of those above.
        weights_only: If True, read only tensors and plain values. With False a checkpoint of unknown origin can run any
            code.
        progress: If True, show a progress bar.

    Returns:
        The averaged weights, as a ``state_dict`` for ``module.load_state_dict``.

    Raises:
        OSError: If a file cannot be opened.
        ValueError: If :func:`average_weights` would raise one, or if a file is damaged, is not a checkpoint, or needs
            ``weights_only=False``. The message names the file.

    Example::

        >>> import os, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> paths = [os.path.join(folder, f"{value}.pt") for value in (1.0, 4.0)]
        >>> for path, value in zip(paths, (1.0, 4.0)):
        ...     torch.save({"weight": torch.tensor([value])}, path)
        >>> average_checkpoints(paths)
        {'weight': tensor([2.5000])}

    ``Trainer(callbacks=[ModelCheckpoint(monitor="val_loss", save_top_k=5), CheckpointAveraging(top=5)])`` averages the
    best checkpoints at the end of a fit.
    """
    return mean_of_checkpoints(paths, weights, key=key, weights_only=weights_only, progress=progress)[0]


def mean_of_checkpoints(
    paths: Sequence[PathLike],
    weights: Sequence[float] | None = None,
    *,
    key: str | None = None,
    weights_only: bool = True,
    progress: bool = False,
    notice: reading.Notice | None = None,
) -> tuple[StateDict, Provenance]:
    """Return what :func:`average_checkpoints` does, and its provenance; ``notice`` hears of each checkpoint."""
    names = listed(paths)
    given = _checked(weights, len(names))
    mean, averages = RunningMean(), []
    with contextlib.closing(_checked_ahead(names, weights_only)) as files:
        for (path, is_checked), weight in shown(zip(files, given, strict=True), len(names), progress):
            read, average = reading.weights_and_provenance(path, weights_only, key, not is_checked, notice=notice)
            mean.add(read, weight, path)
            averages.append(average)
            del read  # or the last file would stay in memory while the next one is read
    return mean.finish(), provenance_of(names, given, averages)


def listed(paths: Sequence[PathLike]) -> list[str]:
    """Return paths as a list of strings.

    Raises:
        ValueError: If ``paths`` is a single path, or has an element that is not one.
    """
    is_one = isinstance(paths, str | bytes | os.PathLike)
    if is_one or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise ValueError(f"`paths` must be a list of paths, got {paths!r}")
    return [os.fspath(path) for path in paths]


def _checked_ahead(names: Sequence[str], weights_only: bool) -> Generator[tuple[str, bool], None, None]:
    """Yield each path and whether the file was checked. The next file is checked while one is averaged."""
    with ThreadPoolExecutor(max_workers=1) as beside:
        check = beside.submit(_check, names[0], weights_only)
        for index, name in enumerate(names):
            is_checked = check.result()
            if index + 1 < len(names):
                check = beside.submit(_check, names[index + 1], weights_only)
            yield name, is_checked


def _check(name: str, weights_only: bool) -> bool:
    """Check a local file; return False for any other, which is fetched only once and checked when it is read."""
    if not os.path.isfile(name):
        return False
    safe_reading.check(name, weights_only)
    return True


def _checked(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("There is nothing to average: pass at least one model or checkpoint")
    try:
        given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        given = []
    if len(given) != count or not all(math.isfinite(w) and w >= 0.0 for w in given) or not 0.0 < sum(given) < math.inf:
        raise ValueError(f"`weights` must be {count} numbers >= 0, not all zero, with a finite sum, got {weights!r}")
    return given


def shown(items: Iterable[Any], count: int, progress: bool) -> Iterable[Any]:
    """Return the items, with a progress bar if ``progress``."""
    if not progress:
        return items
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # installed with Lightning

    return tqdm(items, total=count, desc="averaging", leave=False)
