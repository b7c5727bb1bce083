"""Reports stand alone and say what happened."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.artifact.report import human_bytes, render_report, report_data

HISTORY = (
    {
        "name": "quantize-linear",
        "options": {"scheme": "fp8-block"},
        "matches": 26,
        "near_misses": [{"example": "linear", "reason": "K is 32", "count": 1}],
        "seconds": 1.25,
        "peak_rss_bytes": 3 * 2**20,
        "verification": {"worst_sqnr_db": 31.26, "bitwise": False},
    },
    {"name": "canonicalize", "matches": 2, "verification": {"bitwise": True}},
)


def _pages(stored: Path, **extra: object) -> dict[str, str]:
    manifest = read_manifest(stored).model_copy(update={"history": HISTORY})
    frames = np.random.default_rng(0).integers(0, 255, (6, 8, 12, 3), np.uint8)
    return render_report(
        {**report_data(manifest), **extra}, {"before": frames, "after <b>": frames[::-1]}
    )


def test_each_pass_has_a_row_with_its_numbers_in_every_form(stored: Path) -> None:
    pages = _pages(stored, metrics={"forward_ms": 12.5})
    for page in (pages["report.md"], pages["report.html"]):
        for text in (
            "quantize-linear",
            "26",
            "1.25",
            "3.00 MiB",
            "31.3",
            "bitwise",
            "12.50",
            "fp8-block",
        ):
            assert text in page
    row = json.loads(pages["report.json"])["passes"][0]
    assert (row["matches"], row["near_misses"], row["worst_sqnr_db"]) == (26, 1, 31.26)


def test_the_html_is_well_formed_self_contained_and_escapes_what_it_shows(stored: Path) -> None:
    page = _pages(stored, title="<script>alert(1)</script>")["report.html"]
    assert "<script" not in page
    assert "after &lt;b&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count("data:image/png;base64,") == 8
    _Balanced().feed(page)


def test_a_saved_artifact_holds_its_report(stored: Path) -> None:
    assert "No pass was run" in (stored / "report.html").read_text()
    assert json.loads((stored / "report.json").read_text())["target"] == "cpu"
    assert (stored / "report.md").read_text().startswith("# turbo_opt: ")


def test_sizes_are_written_in_binary_units() -> None:
    written = [human_bytes(n) for n in (5, 1536, 3 * 2**30, 2**42, None)]
    assert written == ["5 B", "1.50 KiB", "3.00 GiB", "4.00 TiB", "–"]


class _Balanced(HTMLParser):
    """Fails on an end tag that closes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
