"""Read and set the state of random generators: torch's, Python's, NumPy's, and those of the run's loaders.

States are tensors and plain values, so that a checkpoint that holds them loads with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

from lightning_optim.runtime.lightning import Trainer
from lightning_optim.runtime.lightning.data_loading import loaders_of


def random_state() -> dict[str, Any]:
    """Return the state of the global generators: torch (CPU and all CUDA devices), Python, and NumPy if it is imported.

    Example::

        >>> before = random_state()
        >>> first = torch.rand(2), random.random()
        >>> set_random_state_(before)
        >>> second = torch.rand(2), random.random()
        >>> torch.equal(first[0], second[0]), first[1] == second[1]
        (True, True)
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, torch.tensor(words), gauss]}
    if "numpy" in sys.modules:
        numpy_state = sys.modules["numpy"].random.get_state()
        if isinstance(numpy_state, tuple):  # a dictionary if the user has replaced NumPy's global generator
            kind, words, *rest = numpy_state
            state["numpy"] = [kind, torch.tensor(words.tolist()), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state_(state: dict[str, Any]) -> None:
    """Set the global generators to a :func:`random_state`; a device that is missing here or there is left alone."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in state and "numpy" in sys.modules:
        kind, words, *rest = state["numpy"]
        sys.modules["numpy"].random.set_state((kind, words.cpu().numpy().astype("uint32"), *rest))
    if torch.cuda.is_available():
        for device, device_state in zip(range(torch.cuda.device_count()), state.get("cuda", []), strict=False):
            torch.cuda.set_rng_state(device_state.cpu(), device)


def seed_everything(seed: int) -> None:
    """Seed the global generators and loaders' workers, as Lightning's ``seed_everything(seed, workers=True)`` does.

    It can be called before the user has imported one of Lightning's packages.
    """
    os.environ.update(PL_GLOBAL_SEED=str(seed), PL_SEED_WORKERS="1")
    random.seed(seed)
    torch.manual_seed(seed)
    with contextlib.suppress(ModuleNotFoundError):
        import numpy

        numpy.random.seed(seed)


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Context manager: afterwards, also after an error, the global generators have their states from before.

    Lightning's ``isolate_rng`` leaves them as they are after an error, and a checkpoint may still be written then.
    """
    before = random_state()
    try:
        yield
    finally:
        set_random_state_(before)


def rank_random_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of all generators of this rank: the global ones, and those of loaders and their samplers."""
    generators = [[generator.get_state() for generator in _loader_generators(loop)] for loop in _loops(trainer)]
    return {"random": random_state(), "generators": generators}


def set_rank_random_state_(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set all generators of this rank to a :func:`rank_random_state`."""
    for loop, states in zip(_loops(trainer), state["generators"], strict=True):
        for generator, generator_state in zip(_loader_generators(loop), states, strict=False):
            generator.set_state(generator_state.cpu())
    set_random_state_(state["random"])


# ---- any generator ---------------------------------------------------------------------------------------------------


def is_generator(value: Any) -> bool:
    """Return True if ``value`` is an object that draws random numbers: one of torch, Python or NumPy."""
    from numpy.random import BitGenerator, Generator, RandomState

    return isinstance(value, torch.Generator | random.Random | BitGenerator | Generator | RandomState)


def generator_state(generator: Any) -> Any:
    """Return the state of such an object."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    generator = getattr(generator, "bit_generator", generator)
    return copy.deepcopy(generator.state) if hasattr(generator, "state") else generator.get_state()


def set_generator_state_(generator: Any, state: Any) -> None:
    """Set the state of such an object to one that :func:`generator_state` returned."""
    generator = getattr(generator, "bit_generator", generator)
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "state"):
        generator.state = state
    else:
        generator.set_state(state)


def _loops(trainer: Trainer) -> tuple[Any, Any]:
    return trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop


def _loader_generators(loop: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for loader in loaders_of(loop):
        for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
                found.append(generator)
    return found
