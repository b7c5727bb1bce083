"""Which configurations were found fastest, kept on disk for later processes.

A JSON file for each GPU, torch, Triton and source of our kernels lies in the folder of compiled
kernels, named by a digest of these four. It may be deleted at any time.

    {"format": 1,
     "environment": {"device": "NVIDIA H200", "kernels": "…", "torch": "…", "triton": "…"},
     "choices": {"('dq', cuda, torch.bfloat16, …)": "TileConfig(q=64, k=64, warps=4, stages=3)"}}

A file that is damaged, or is not what its name says, counts as empty and is replaced. Several
processes may write at once: each replaces the file whole, by what was in it just before and what
it knows itself. A choice of another that is written at the same moment may be lost; it is measured
again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import torch

from .._cuda.compiler import cache_folder
from ..provider_table import current_versions
from ..whole_file import write_whole

FORMAT = 1
CACHE_VARIABLE = "TURBO_OPT_TUNING_CACHE"  # "0": nothing is read or kept
MOST_CHOICES = 4096  # of a file; the oldest go first
MOST_FILES = 8

_read_before: dict[Path, dict[str, str]] = {}


def kept_choice(problem: str) -> str | None:
    """The configuration kept for a problem on the current device, None if there is none."""
    if os.environ.get(CACHE_VARIABLE) == "0":
        return None
    path = _path()
    if path not in _read_before:
        _read_before[path] = _read(path)
    return _read_before[path].get(problem)


def keep_choice(problem: str, config: str) -> None:
    """Keep a configuration of the current device; where that cannot be written, do without."""
    if os.environ.get(CACHE_VARIABLE) == "0":
        return
    path = _path()
    choices = {**_read_before.get(path, {}), **_read(path)}
    choices.pop(problem, None)
    choices[problem] = config
    choices = dict(list(choices.items())[-MOST_CHOICES:])
    _read_before[path] = choices
    text = json.dumps({"format": FORMAT, "environment": _environment(), "choices": choices})
    with contextlib.suppress(OSError):
        write_whole(path, text)
        _remove_all_but_the_latest(path.parent)


def _environment() -> dict[str, str]:
    """What a choice holds for."""
    return {"device": torch.cuda.get_device_name(), **_versions()}


@functools.cache
def _versions() -> dict[str, str]:
    return current_versions()


def _path() -> Path:
    text = json.dumps(_environment(), sort_keys=True)
    return cache_folder() / f"tuning-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> dict[str, str]:
    """The choices of a file; none if it is missing, damaged or of another environment."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}
    choices = content.get("choices")
    if content.get("environment") != _environment() or not isinstance(choices, dict):
        return {}
    return {problem: config for problem, config in choices.items() if isinstance(config, str)}


def _remove_all_but_the_latest(folder: Path) -> None:
    """Files of kernels and libraries long gone would pile up."""
    files = sorted(folder.glob("tuning-*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MOST_FILES]:
        file.unlink(missing_ok=True)
