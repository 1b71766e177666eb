"""Read ``torch.nn.utils.parametrizations.spectral_norm``, whose class and buffers have private names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from lightning_optim.base.module_registry import buffer_names
from lightning_optim.runtime.lightning.private_names import entry_of, read_private

VECTORS = ("_u", "_v")
"""Names of the buffers with the left and the right singular vector."""


def parametrization(module: nn.Module) -> _SpectralNorm | None:
    """Return the module if it is a spectral normalization that holds singular vectors, else ``None``.

    The parametrization of a vector only normalizes it, and holds no vectors.

    Raises:
        RuntimeError: If it holds buffers of other names.
    """
    if not isinstance(module, _SpectralNorm) or not (names := list(buffer_names(module))):
        return None
    if not set(VECTORS) <= set(names):
        raise RuntimeError(f"Spectral normalization holds {names}: {entry_of('_u').message()}.")
    return module


def as_matrix(norm: _SpectralNorm, weight: Tensor) -> Tensor:
    """Return a weight as the matrix whose singular vectors the normalization holds."""
    return read_private(norm, "_reshape_weight_to_matrix")(weight)
