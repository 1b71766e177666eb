"""Know the version of this package."""

from __future__ import annotations

from importlib import metadata

VERSION = "0.1.0"
"""Version of this source, for a checkout that is not installed; a test compares it with ``pyproject.toml``."""


def installed_version() -> str:
    """Return the version in the metadata of the installed package, or that of this source if it is not installed."""
    try:
        return metadata.version("lightning-optim")
    except metadata.PackageNotFoundError:
        return VERSION
