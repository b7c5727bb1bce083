"""Errors of the kernels package. A message names the thing, its value and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KernelError(Exception):
    """Base of every error raised by `turbo_opt.kernels`."""


class OperatorInputError(KernelError, ValueError):
    """An operator was called with a shape, dtype or option that it does not define."""


class ProviderError(KernelError, RuntimeError):
    """A provider was forced that does not exist or cannot serve the call."""


def name_the_nearest(wrong: str, allowed: Iterable[str]) -> str:
    """End an error message: the nearest allowed name, if one is near, and all allowed names."""
    names = sorted(allowed)
    nearest = difflib.get_close_matches(wrong, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{hint}allowed: {', '.join(names)}"
