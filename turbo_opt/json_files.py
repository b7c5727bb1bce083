"""JSON files from other people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from turbo_opt.errors import BadInput


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BadInput: missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return value
