"""Make the objects that a parser of jsonargparse has read, with any version of it."""

from __future__ import annotations

from typing import Any

import jsonargparse


def instantiate(parser: jsonargparse.ArgumentParser, config: Any) -> Any:
    """Return the namespace with objects in the place of class paths and arguments."""
    # The first is the name from 4.49 on, where the second is deprecated.
    return parser.instantiate(config) if hasattr(parser, "instantiate") else parser.instantiate_classes(config)
