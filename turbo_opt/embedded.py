"""What lies inside the package, by the names that recipes and jobs have for it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

_PLACES = {
    "tiny-wan": "tiny_wan",
    "tiny-wan-rcm": "tiny_wan_students/rcm.safetensors",
    "tiny-wan-sla": "tiny_wan_students/sla.safetensors",
}
"""The miniature Wan, its student of one to four steps, and the one that attends sparsely."""


def embedded(name: str) -> Path | None:
    """The folder or file of that name; None if there is none inside the package."""
    if name not in _PLACES:
        return None
    with resources.as_file(resources.files("turbo_opt") / "models") as models:
        return Path(models) / _PLACES[name]
