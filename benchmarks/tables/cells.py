"""How names and numbers are written in tables."""

from __future__ import annotations

from benchmarks.results import RESULTS, Record, read
from benchmarks.targets import GPU

MODELS = {
    "wan2.1-t2v-1.3b-480p": "1.3B, 480p, 81 frames",
    "wan2.1-t2v-1.3b-480p-prompt-512": "1.3B, 480p, 81 frames, a prompt without padding",
    "wan2.1-t2v-14b-720p": "14B, 720p, 81 frames",
}


def number(value: float) -> str:
    """Four digits that count, thousands set apart: `0.005466`, `17.62`, `2,508`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short(name: str) -> str:
    """A record's name without the GPU, which the text names."""
    return name.removeprefix(f"{GPU}/")


def by_name(file: str) -> dict[str, Record]:
    """The records of one file."""
    return {record.name: record for record in read(RESULTS / file)}
