"""Run one pipeline on a captured variant."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.ir.program import Program
from turbo_opt.targets import get_target


@pytest.fixture(scope="session")
def optimize() -> Callable[..., Program]:
    """`optimize(program, "canonicalize,fuse-norms")` with every match verified."""

    def run(
        program: Program, pipeline: str, verify: str = "all", target: str | None = None
    ) -> Program:
        machine = get_target(target) if target is not None else None
        planned = validate_pipeline(parse_pipeline(pipeline), target=machine)
        manager = PassManager(planned, verification=Verification(mode=verify))
        return manager.run(program)

    return run
