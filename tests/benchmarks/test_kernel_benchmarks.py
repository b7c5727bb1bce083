"""Every kernel has its benchmark and its test, and what they measure of sparse attention."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import bench_block_sparse_attention
from benchmarks.kernels._harness import Session
from benchmarks.kernels.all import BENCHES
from benchmarks.results import ROOT


def test_a_kernel_its_benchmark_and_its_test_share_a_name():
    kernels = {path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")}
    assert set(BENCHES) == kernels
    for name in kernels:
        assert (ROOT / "benchmarks" / "kernels" / f"bench_{name}.py").is_file(), name
        assert (ROOT / "tests" / "kernels" / f"test_{name}.py").is_file(), name


def test_sparse_attention_is_timed_whole_in_16_bits_and_alone_in_8(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)
    monkeypatch.setattr(Session, "runs", 1)
    session = Session(dry=True)
    bench_block_sparse_attention.bench(session)
    assert session.failures == []
    records = {record.name: record for record in session.records}
    whole, alone = (f"dry/block_sparse_attention/2x200_{unit}" for unit in ("ms", "tops"))
    assert sorted(records) == [whole, alone]
    assert records[alone].unit == "TOPS"
    # The kernel alone does what the whole operator does, not less.
    assert records[alone].quality["sqnr_db_vs_norm_rope_sagesla"] > 40
