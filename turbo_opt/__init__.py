"""turbo_opt: an ahead-of-time compiler for video diffusion models.

artifact = turbo_opt.load("wan-fast")        # a drop-in for pipe.transformer
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from turbo_opt._version import __version__

if TYPE_CHECKING:
    from turbo_opt.artifact.load import load as load
    from turbo_opt.capture import capture as capture

_LAZY = {
    "capture": "turbo_opt.capture",
    "load": "turbo_opt.artifact.load",
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'turbo_opt' has no attribute {name!r}")
