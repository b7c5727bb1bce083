"""The report of a compilation: JSON for programs, Markdown for reviews, HTML for people.

The HTML stands alone: no script, no network, images inside it, light and dark.
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


def report_data(manifest: Manifest) -> dict[str, Any]:
    """What a report says about an artifact, as JSON values.

    Callers may add `title` (text), `metrics` (name → value, the final table) and `notes` (list of
    text).
    """
    model = manifest.components.source
    return {"title": f"turbo_opt: {model}", "metrics": {}, "notes": [], **summarize(manifest)}


def render_report(
    data: Mapping[str, Any], frames: Mapping[str, np.ndarray] | None = None
) -> dict[str, str]:
    """File name → text of `report.json`, `report.md` and `report.html`.

    Args:
        data: as `report_data` gives it.
        frames: label → (F, H, W, 3) uint8; a few frames of each are shown side by side.
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
    environment.filters |= {"size": human_bytes, "number": number, "json": _compact, "cell": _cell}
    pictures = {label: _pictures(clip) for label, clip in (frames or {}).items()}
    return {
        "report.json": json.dumps(data, indent=1, allow_nan=False) + "\n",
        "report.md": environment.get_template("report.md").render(data),
        "report.html": environment.get_template("report.html").render(data, pictures=pictures),
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


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _pictures(clip: np.ndarray) -> list[str]:
    from PIL import Image

    indices = np.linspace(0, len(clip) - 1, min(_SHOWN_FRAMES, len(clip))).round().astype(int)
    pictures = []
    for index in indices:
        buffer = io.BytesIO()
        Image.fromarray(clip[index]).save(buffer, "PNG", optimize=True)
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    return pictures
