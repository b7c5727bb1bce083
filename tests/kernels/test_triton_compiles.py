"""Triton's kernels compile for the GPUs of recipes, on machines that have none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

SCRIPT = Path(__file__).parent / "compile_for.py"
SHARED_BYTES = {"sm89": 99 * 1024}
"""Of a program, at most, by GPU. Source: CUDA C++ Programming Guide, technical specifications.

For sm120, which has as many, `compile_for.py tiny-wan/rtx5090 sm120` does the same; here it would
take as long again.
"""


def test_kernels_compile_for_an_rtx_4090_and_what_serves_unmeasured_fits(tmp_path):
    variables = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "tiny-wan/rtx4090", *SHARED_BYTES],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.keys() == SHARED_BYTES.keys()
    for gpu, operators in found.items():
        assert {"block_linear", "linear_gelu_quantize", "padded_attention"} <= operators.keys()
        for name, launches in operators.items():
            first = [launch["shared"] for launch in launches if launch["config"] == 0]
            assert first and max(first) <= SHARED_BYTES[gpu], (gpu, name)
        configs = {launch["config"] for launch in operators["block_linear"]}
        assert configs == {0, 1, 2, 3}
