"""Reports stand alone and say what happened."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.artifact.report import human_bytes, render_report, report_data

HISTORY = (
    {
        "name": "quantize-linear",
        "options": {"scheme": "fp8-block"},
        "matches": 26,
        "near_misses": [{"example": "linear", "reason": "K is 32", "count": 1}],
        "seconds": 1.25,
        "weight_bytes_before": 2**30,
        "peak_rss_bytes": 3 * 2**20,
        "verification": {"worst_sqnr_db": 31.26, "bitwise": False, "worst_module": "blocks.1.ffn"},
        "choices": [
            {
                "denoiser": "transformer",
                "module": "blocks.1.ffn",
                "choice": "16 bits",
                "reason": "fp8-block has 20.0 dB | less",
            },
            {"module": "of another kind"},
        ],
    },
    {"name": "canonicalize", "matches": 2, "verification": {"bitwise": True}},
)


def _pages(stored: Path, **extra: object) -> dict[str, str]:
    manifest = read_manifest(stored).model_copy(update={"history": HISTORY})
    frames = np.random.default_rng(0).integers(0, 255, (6, 8, 12, 3), np.uint8)
    return render_report(
        {**report_data(manifest), **extra},
        {"before": frames, "after <b>": frames[::-1]},
        {"before": b"\0\0\0\x20ftypisom", "after <b>": b"clip"},
    )


def test_each_pass_has_a_row_with_its_numbers_in_every_form(stored: Path) -> None:
    pages = _pages(stored, metrics={"forward_ms": 12.5})
    for page in (pages["report.md"], pages["report.html"]):
        for text in (
            "quantize-linear",
            "26",
            "1.25 s",
            "1.00 GiB",
            "3.00 MiB",
            "31.3 dB",
            "bitwise",
            "12.50",
            "scheme=fp8-block",
        ):
            assert text in page
    row = json.loads(pages["report.json"])["passes"][0]
    assert (row["matches"], row["near_misses"], row["worst_sqnr_db"]) == (26, 1, 31.26)


def test_what_was_chosen_for_a_layer_is_told_with_the_reason(stored: Path) -> None:
    pages = _pages(stored)
    assert "| blocks.1.ffn | 16 bits | fp8-block has 20.0 dB \\| less |" in pages["report.md"]
    assert "<td>16 bits</td><td>fp8-block has 20.0 dB | less</td>" in pages["report.html"]
    assert "What canonicalize chose" not in pages["report.html"]
    (choice,) = json.loads(pages["report.json"])["passes"][0]["choices"]
    assert choice["module"] == "blocks.1.ffn"


def test_the_html_is_well_formed_self_contained_and_escapes_what_it_shows(stored: Path) -> None:
    page = _pages(stored, title="<script>alert(1)</script>")["report.html"]
    assert "<script" not in page
    assert "after &lt;b&gt;" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"url\(|@import|<link", page)
    assert page.count("data:image/png;base64,") == 12
    assert page.count("data:video/mp4;base64,") == 2
    parser = _Balanced()
    parser.feed(page)
    assert not parser.open


def test_the_page_goes_from_what_was_gained_to_details_folded_away(stored: Path) -> None:
    row = {"measure": "time per clip", "before": "9.00 s", "after": "3.00 s", "change": "3.00×"}
    page = _pages(stored, metrics={"speed-up": "3.00×"}, comparison=[row])["report.html"]
    order = ("<b>3.00×</b>", "Before and after", ">Passes<", "<video", "<img", "<details>")
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "<details open" not in page
    folded = page[page.index("<details>") :]
    for text in ("Near miss, 1×: K is 32 (first: linear)", "blocks.1.ffn", "Environment"):
        assert text in folded


def test_stills_are_the_same_frames_of_each_clip_with_what_differs(stored: Path) -> None:
    clip = np.zeros((9, 8, 12, 3), np.uint8)
    other = clip + np.uint8(3)
    data = report_data(read_manifest(stored))
    page = render_report(data, {"before": clip, "after": other})["report.html"]
    captions = re.findall(r"<span>(frame[^<]*)</span>", page)
    assert captions == [f"frame {index} of 9" for index in (1, 4, 6, 9)]
    alts = re.findall(r'alt="([^"]*)"', page)
    assert alts[:3] == [f"{name}, frame 1 of 9" for name in ("before", "after", "difference ×64")]
    stills = re.findall(r"image/png;base64,([^\"]*)", page)
    assert {_colour(still) for still in stills[2::3]} == {(192, 192, 192)}
    same = render_report(data, {"before": clip, "after": clip})["report.html"]
    assert "no difference" in same
    three = render_report(data, {"a": clip, "b": other, "c": clip})["report.html"]
    assert "difference" not in three


def test_large_stills_are_scaled_down(stored: Path) -> None:
    clip = np.zeros((1, 480, 832, 3), np.uint8)
    page = render_report(report_data(read_manifest(stored)), {"after": clip})["report.html"]
    (still,) = re.findall(r"image/png;base64,([^\"]*)", page)
    assert _image(still).size == (640, 369)


def test_a_cached_pass_is_called_so_and_costs_no_time(stored: Path) -> None:
    history = ({**HISTORY[0], "cached": True}, {**HISTORY[1], "seconds": 0.5})
    manifest = read_manifest(stored).model_copy(update={"history": history})
    pages = render_report(report_data(manifest))
    assert "| cached |" in pages["report.md"]
    assert "1.25 s" not in pages["report.html"]
    assert pages["report.html"].count("0.50 s") == 2


def test_weights_that_did_not_shrink_are_not_called_smaller(stored: Path) -> None:
    manifest = read_manifest(stored)
    same = sum(item["weight_bytes"] for item in report_data(manifest)["denoisers"].values())
    history = ({"name": "canonicalize", "weight_bytes_before": same},)
    page = render_report(report_data(manifest.model_copy(update={"history": history})))
    assert "weights, from" in page["report.html"]
    assert "smaller" not in page["report.html"]


def test_a_saved_artifact_holds_its_report(stored: Path) -> None:
    assert "No pass was run" in (stored / "report.html").read_text()
    assert json.loads((stored / "report.json").read_text())["target"] == "cpu"
    assert (stored / "report.md").read_text().startswith("# turbo_opt: ")


def test_sizes_are_written_in_binary_units() -> None:
    written = [human_bytes(n) for n in (5, 1536, 3 * 2**30, 2**42, None)]
    assert written == ["5 B", "1.50 KiB", "3.00 GiB", "4.00 TiB", "–"]


def _image(still: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(still)))


def _colour(still: str) -> tuple[int, ...]:
    ((_, colour),) = _image(still).getcolors()
    return colour


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
