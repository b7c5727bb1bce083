"""The report of a compilation: JSON for programs, Markdown for reviews, HTML for people.

The HTML stands alone: no script, no network, images and clips inside it, light and dark.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from turbo_opt.artifact.inspect import summarize
from turbo_opt.artifact.manifest import Manifest, jsonable

_SHOWN_FRAMES = 4
_STILL_WIDTH = 640
"""Stills are scaled down to this, in pixels: they are shown at less than half of it."""
_MAX_GAIN = 64


def report_data(manifest: Manifest) -> dict[str, Any]:
    """What a report says about an artifact, as JSON values.

    Callers may change `title` (text) and `context` (name → text, under the title), and add
    `metrics` (name → value, shown first), `comparison` (rows of `measure`, `before`, `after` and
    `change`, all text) and `notes` (list of text).
    """
    model, recipe = manifest.components.source, manifest.recipe
    summary = summarize(manifest)
    schedule = summary["schedule"]
    context = {
        "recipe": recipe.get("description"),
        "compiled for": manifest.target,
        "sampling": f"{schedule['steps']} steps, {schedule['evaluations']} network evaluations",
    }
    return {
        "title": f"turbo_opt: {model}",
        "context": {name: text for name, text in context.items() if text},
        "metrics": {},
        "comparison": [],
        "notes": [],
        "weights": _weights(summary),
        **summary,
    }


def render_report(
    data: Mapping[str, Any],
    frames: Mapping[str, np.ndarray] | None = None,
    videos: Mapping[str, bytes] | None = None,
) -> dict[str, str]:
    """File name → text of `report.json`, `report.md` and `report.html`.

    Args:
        data: as `report_data` gives it.
        frames: label → (F, H, W, 3) uint8; the same few frames of each are shown one under
            another, and how two clips of one size differ.
        videos: label → an mp4 file, to be played side by side.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    data = jsonable(data)
    environment = Environment(
        loader=PackageLoader("turbo_opt.artifact", "templates"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": human_bytes,
        "number": number,
        "time": _time,
        "agreement": _agreement,
        "settings": _settings,
        "pretty": _pretty,
        "cell": _cell,
    }
    strip = _film_strip(frames) if frames else []
    clips = {label: _base64(content) for label, content in (videos or {}).items()}
    return {
        "report.json": json.dumps(data, indent=1, allow_nan=False) + "\n",
        "report.md": environment.get_template("report.md").render(data),
        "report.html": environment.get_template("report.html").render(
            data, strip=strip, clips=clips, aspect=_aspect(frames or {})
        ),
    }


def human_bytes(count: float | None) -> str:
    """`1536` → `1.50 KiB`."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def number(value: Any, digits: int = 1) -> str:
    """A number with fixed digits, `∞` for infinity, a dash for nothing."""
    if value is None:
        return "–"
    if value == "Infinity":
        return "∞"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return f"{value:,}" if type(value) is int else str(value)


def _weights(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of all weights `before` the first pass (None where unknown) and `after` the last."""
    before = summary["passes"][0]["weight_bytes_before"] if summary["passes"] else None
    after = sum(item["weight_bytes"] for item in summary["denoisers"].values())
    return {"before": before, "after": after, "times_smaller": before / after if before else None}


def _time(row: Mapping[str, Any]) -> str:
    if row["cached"]:
        return "cached"
    return "–" if row["seconds"] is None else f"{row['seconds']:,.2f} s"


def _agreement(row: Mapping[str, Any]) -> str:
    """The worst SQNR of a pass: `bitwise`, decibels, or a dash where nothing was checked."""
    value = row["worst_sqnr_db"]
    if row["bitwise"]:
        return "bitwise"
    return "–" if value is None else f"{value:.1f} dB"


def _settings(options: Mapping[str, Any]) -> str:
    """Options as a pipeline writes them: `scheme=int8-block skip={first=0 names=[]}`."""
    return " ".join(f"{name}={_setting(value)}" for name, value in options.items())


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + _settings(value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_setting, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _film_strip(clips: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A few frames: for each its `caption` and `stills`, label → PNG in base64."""
    length = min(map(len, clips.values()))
    chosen = np.linspace(0, length - 1, min(_SHOWN_FRAMES, length)).round().astype(int)
    shown = {label: clip[chosen] for label, clip in clips.items()}
    if len(shown) == 2:
        one, other = shown.values()
        if one.shape == other.shape:
            shown |= _difference(one, other)
    return [
        {
            "caption": f"frame {index + 1} of {length}",
            "stills": {label: _png(stills[place]) for label, stills in shown.items()},
        }
        for place, index in enumerate(chosen)
    ]


def _aspect(clips: Mapping[str, np.ndarray]) -> float | None:
    """Width by height of the first clip."""
    for clip in clips.values():
        return clip.shape[2] / clip.shape[1]
    return None


def _difference(one: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """What differs, brightened by a power of two so that it can be seen; the label says by how
    much."""
    error = np.abs(one.astype(np.int16) - other.astype(np.int16))
    if not error.any():
        return {"no difference": error.astype(np.uint8)}
    high = max(float(np.quantile(error, 0.999)), 1.0)
    gain = min(_MAX_GAIN, 2 ** int(np.log2(255 / high)))
    return {f"difference ×{gain}": np.minimum(error * gain, 255).astype(np.uint8)}


def _png(frame: np.ndarray) -> str:
    from PIL import Image

    image, buffer = Image.fromarray(frame), io.BytesIO()
    if image.width > _STILL_WIDTH:
        image = image.resize((_STILL_WIDTH, round(image.height * _STILL_WIDTH / image.width)))
    image.save(buffer, "PNG", optimize=True)
    return _base64(buffer.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
