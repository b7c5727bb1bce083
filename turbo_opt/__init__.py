"""turbo_opt: an ahead-of-time compiler for video diffusion models.

artifact = turbo_opt.load("wan-fast")        # a drop-in for pipe.transformer
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from turbo_opt._version import __version__

if TYPE_CHECKING:
    from turbo_opt.artifact.load import load as load
    from turbo_opt.artifact.save import save as save
    from turbo_opt.artifact.verify import verify as verify
    from turbo_opt.compiler.build import build as build
    from turbo_opt.config.loader import load_recipe as load_recipe
    from turbo_opt.runtime.scheduler import RCMScheduler as RCMScheduler

_LAZY = {
    "RCMScheduler": "turbo_opt.runtime.scheduler",
    "build": "turbo_opt.compiler.build",
    "load": "turbo_opt.artifact.load",
    "load_recipe": "turbo_opt.config.loader",
    "save": "turbo_opt.artifact.save",
    "verify": "turbo_opt.artifact.verify",
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'turbo_opt' has no attribute {name!r}")
