"""Python's cyclic garbage collector, out of the way of work that builds large graphs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic collection inside.

    A collection walks all objects of all graphs, and is due again and again while one is built:
    up to half of the time that this takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
