"""Markers and what all tests share."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, so before any test is
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TURBO_OPT_PROVIDER_TABLE"] = "0"  # choices as declared, not as measured somewhere
os.environ["TURBO_OPT_TUNING_CACHE"] = "0"  # nor configurations as tuned before


_VARIANTS = "tests.helpers.variants"
"""Who uses it needs every member of the Wan family captured."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # one process captures for all; every other module stays whole as well
        module = item.getparent(pytest.Module)
        assert module is not None
        names = vars(module.obj).values()
        captures = any(getattr(value, "__module__", None) == _VARIANTS for value in names)
        item.add_marker(pytest.mark.xdist_group(_VARIANTS if captures else module.nodeid))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
