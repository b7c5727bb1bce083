"""Markers and what all tests share."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, so before any test is
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TURBO_OPT_PROVIDER_TABLE"] = "0"  # choices as declared, not as measured somewhere
os.environ["TURBO_OPT_TUNING_CACHE"] = "0"  # nor configurations as tuned before


_TOGETHER = {
    "captured": ("tests/capture/", "tests/passes/", "tests/runtime/"),
    "compiled": ("tests/artifact/", "tests/cli/"),
}
"""Folders whose tests want the same: every member of the Wan family captured, a small artifact."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process makes what several modules want; of the others each stays whole."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scopes = [name for name, folders in _TOGETHER.items() if nodeid.startswith(folders)]
            return scopes[0] if scopes else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
