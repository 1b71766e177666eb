"""Delay an interrupt while weights are being exchanged."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Context manager: an interrupt (SIGINT) takes effect at the end, never between two tensors of an exchange.

    Otherwise the module could be left with some tensors of the average and some raw ones. A no-op in other threads than
    the main one, which gets the signals.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
