"""Every error a user can meet, by what the command line answers with.

A message names the thing, its value and what would be right; it stands alone without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TurboOptError(Exception):
    """The base of all errors of ours: the run failed (exit code 1)."""

    exit_code = 1


class PassFailed(TurboOptError):
    """A pass could not do, or did wrongly, what was asked of it."""


class BadInput(TurboOptError):
    """The user's recipe, flag, folder or file is wrong (exit code 2). Nothing was written."""

    exit_code = 2


class BudgetExceeded(TurboOptError):
    """A result is worse than the recipe's `verify` budget allows (exit code 3)."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` when a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for an unknown name: the nearest known one and all that are allowed."""
    known = sorted(known)
    guess = nearest(name, known)
    return f"unknown {kind} {name!r}{guess or '.'} Known: {', '.join(known) or 'none'}."
