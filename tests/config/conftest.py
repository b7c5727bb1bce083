"""A registry of stand-in passes, so that these tests do not depend on the real ones."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field

from turbo_opt.compiler import base
from turbo_opt.compiler.base import Numerics, Pass, PassOptions, register_pass


class _Standin(Pass):
    numerics = Numerics.EXACT

    def run(self, program, options, context):
        raise NotImplementedError


class Skip(PassOptions):
    """Layers to leave alone."""

    first: int = Field(default=0, ge=0, description="Blocks at the start.")
    last: int = Field(default=0, ge=0, description="Blocks at the end.")
    names: list[str] = Field(default=[], description="Globs over module names.")


@pytest.fixture(autouse=True)
def standin_passes(request, monkeypatch):
    """`canonicalize`, `fuse-norms`, `quantize-linear`, `fuse-norm-quantize`, `hoist-invariants`."""
    if request.node.get_closest_marker("real_passes"):
        return
    monkeypatch.setattr(base, "_PASSES", {})
    monkeypatch.setattr(base, "_loaded", True)

    @register_pass
    class Canonicalize(_Standin):
        name = "canonicalize"

    @register_pass
    class FuseNorms(_Standin):
        name = "fuse-norms"

        class Options(PassOptions):
            adaln: bool = Field(default=True, description="LayerNorm with modulation.")

    @register_pass
    class QuantizeLinear(_Standin):
        name = "quantize-linear"

        class Options(PassOptions):
            scheme: Literal["int8-block", "fp8-block"] = Field(description="Number format.")
            skip: Skip = Field(default=Skip(), description="Layers to leave alone.")

    @register_pass
    class FuseNormQuantize(_Standin):
        name = "fuse-norm-quantize"

    @register_pass
    class HoistInvariants(_Standin):
        name = "hoist-invariants"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project folder that is the current directory; call it to write a file."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def pytest_configure(config):
    config.addinivalue_line("markers", "real_passes: use the registry as installed")
