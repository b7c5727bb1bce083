"""Markers and what all tests share."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported, so before any test is
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["TURBO_OPT_PROVIDER_TABLE"] = "0"  # choices as declared, not as measured somewhere
os.environ["TURBO_OPT_TUNING_CACHE"] = "0"  # nor configurations as tuned before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
