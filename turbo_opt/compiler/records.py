"""What reports say about a pass run, from its record in a Program's history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CHOICE = {"denoiser", "module", "choice", "reason"}


def pass_row(record: Mapping[str, Any]) -> dict[str, Any]:
    """What reports say about one pass run, from its record in the history.

    The record may come from someone else's manifest: what is of another kind counts as absent.
    """
    verification = _kind(record.get("verification"), dict) or {}
    misses = [
        item for item in _kind(record.get("near_misses"), list | tuple) or [] if "count" in item
    ]
    choices = [
        item
        for item in _kind(record.get("choices"), list | tuple) or []
        if isinstance(item, dict) and item.keys() >= _CHOICE
    ]
    name = str(record.get("name", "?"))
    return {
        "name": name,
        "text": str(record.get("text", name)),
        "options": _kind(record.get("options"), dict) or {},
        "numerics": record.get("numerics"),
        "matches": _kind(record.get("matches"), int),
        "near_misses": sum(_kind(miss["count"], int) or 0 for miss in misses),
        "near_miss_reasons": misses,
        "choices": choices,
        "seconds": _kind(record.get("seconds"), int | float),
        "peak_bytes": _kind(record.get("peak_rss_bytes"), int),
        "weight_bytes_before": _kind(record.get("weight_bytes_before"), int),
        "weight_bytes_after": _kind(record.get("weight_bytes_after"), int),
        "checked": _kind(verification.get("checked"), int) or 0,
        "bitwise": bool(verification.get("bitwise")),
        "worst_sqnr_db": _kind(verification.get("worst_sqnr_db"), int | float),
        "worst_module": verification.get("worst_module"),
        "cached": bool(record.get("cached")),
    }


def _kind(value: Any, kind: Any) -> Any:
    return value if isinstance(value, kind) else None
