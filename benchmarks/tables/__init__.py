"""The tables of the pages, written from benchmarks/results/ and from the pass registry.

python -m benchmarks.tables          # rewrites what stands between the markers
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.results import ROOT
from benchmarks.tables.compiler import compilation, passes
from benchmarks.tables.kernels import attention, linear
from benchmarks.tables.models import clips, cold_start, forward
from benchmarks.tables.targets import shares, targets
from benchmarks.tables.training import guide, scores, students, training

PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("tiny-wan.md", "training.md")))
"""Where there are tables."""
TABLES: dict[str, Callable[[], str]] = {
    "passes": passes,
    "targets": targets,
    "forward": forward,
    "clips": clips,
    "cold_start": cold_start,
    "attention": attention,
    "shares": shares,
    "linear": linear,
    "training": training,
    "guide": guide,
    "students": students,
    "scores": scores,
    "compilation": compilation,
}


def filled(text: str) -> str:
    """`text` with every marked table made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
    return text
