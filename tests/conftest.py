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


_CAPTURING = ("tests/capture/", "tests/passes/", "tests/runtime/")
"""Folders whose tests want every member of the Wan family captured."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process captures for all; of the other modules each stays whole."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            whole = nodeid.startswith(_CAPTURING)
            return "captured" if whole else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
