"""Warn and log on the first rank alone, as Lightning does, also before a package of Lightning is imported."""

from __future__ import annotations

import warnings

from lightning_utilities.core import rank_zero


def _is_rank_zero() -> bool:
    """Return True on the first rank, and as long as nothing has set a rank, as Lightning and Fabric do."""
    return getattr(rank_zero.rank_zero_only, "rank", 0) == 0


def rank_zero_warn(message: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Warn on the first rank. With the default ``stacklevel`` the warning names the caller's line."""
    if _is_rank_zero():
        warnings.warn(message, category=category, stacklevel=stacklevel + 1)


def rank_zero_info(message: str) -> None:
    """Log on the first rank, with Lightning's logger, which users have configured."""
    if _is_rank_zero():
        rank_zero.log.info(message)
