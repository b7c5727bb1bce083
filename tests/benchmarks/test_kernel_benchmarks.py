"""Every kernel has its benchmark and its test, and what they measure of sparse attention."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from benchmarks.kernels import bench_block_sparse_attention
from benchmarks.kernels import bench_cuda_preparation as preparation
from benchmarks.kernels._harness import Session, sqnr_db
from benchmarks.kernels.all import BENCHES
from benchmarks.results import ROOT, Record
from benchmarks.targets import MEMORY_BOUND
from tests.kernels import test_cuda_preparation as layout

PARTS_OF_KERNELS = {"cuda_preparation"}  # timed alone, though no operator is only that
CPU = torch.device("cpu")


def test_a_kernel_its_benchmark_and_its_test_share_a_name():
    kernels = {path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")}
    assert set(BENCHES) == kernels | PARTS_OF_KERNELS
    for name in BENCHES:
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


def test_every_share_of_copy_that_is_measured_is_a_target_and_no_other(monkeypatch):
    session, names = Session(), set()

    def bench_rows(
        session: Session, name: str, make: Any, baselines: Any, shapes=None, scheme=None
    ):
        for tokens, channels in shapes or session.rows:
            names.add("/".join([name, *([scheme] if scheme else []), f"{tokens}x{channels}"]))

    for module in (importlib.import_module(f"benchmarks.kernels.bench_{name}") for name in BENCHES):
        if hasattr(module, "bench_rows"):
            monkeypatch.setattr(module, "bench_rows", bench_rows)
            module.bench(session)
    for heads, tokens in session.attention:
        names |= {f"{part.name}/{tokens}x{heads * 128}" for part in preparation.PARTS}
    assert names == set(MEMORY_BOUND)


def test_where_preparation_cannot_run_its_bytes_are_said_and_nothing_is_recorded(capsys):
    session = Session(dry=True)
    preparation.bench(session)
    assert (session.records, session.failures) == ([], [])
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("left out, as they are written for sm90 and this is cpu: measure_rms, ")
    assert len(others) == 8 and "measure_rms/32760x1536 would move 226.7 MB" in others


def test_preparation_moves_the_bytes_counted_by_hand():
    made = preparation.operands(2, 200, CPU)
    one, state = 2 * 200 * 128 * 2, 2 * 128 * 128  # bytes of q; elements of a head's matrix
    k_tile, q_tile = 2 * 2 * 128 * 128, 2 * 4 * 64 * 128  # bytes in 8 bits, with padding
    turns = 200 * 64 * 4  # cos and sin in 16 bits
    tables = 200 * 4 + 2 * 128 * 4 + turns  # rstd, RMSNorm's weights
    head = 2 * 128 * 4  # a float32 for each channel
    assert {part.name: part.moved_bytes(made) for part in preparation.PARTS} == {
        "measure_rms": 2 * one + 2 * 200 * 4 + 3 * turns,
        "measure_keys": 2 * one + tables + 4 * 2 * head,
        "prepare_keys": 2 * one + tables + 2 * head + 2 * 2 * 4 + 2 * k_tile + 4 * state + head,
        "prepare_queries": one + tables + 2 * state + head + 128 * 4
        + (q_tile + 4 * 2 * 4 * 64 + 4 * head + one),
    }  # fmt: skip


def test_preparation_is_defined_as_tritons_kernels_do_it():
    from turbo_opt.kernels._triton.attention import launch, operands

    torch.manual_seed(0)
    made = preparation.operands(2, 200, CPU)
    # In float32, as the interpreter does not multiply bfloat16.
    ready = launch.prepare(
        made.q.float(), made.k.float(), made.v.float(), operands.Blocks(0.5, 64, 128),
        rotation=operands.Rotation(
            made.q_weight, made.k_weight, made.cos, made.sin, preparation.EPS
        ),
        projection=operands.Projection(made.proj_weight, made.bias, preparation.FEATURE_MAP),
        int8=True, fp8=True,
    )  # fmt: skip
    defined = {name: x for part in preparation.PARTS for name, x in part.defined(made).items()}
    even_first = [*range(0, 128, 2), *range(1, 128, 2)]
    for name, actual in (("q_means", ready.q_means), ("k_means", ready.k_means)):
        torch.testing.assert_close(actual, defined[name][..., even_first], rtol=1e-4, atol=1e-5)
    for name, actual in (("q_int8", ready.q_int8), ("k_int8", ready.k_int8)):
        assert sqnr_db(defined[name][..., even_first], actual) > 40, name
    torch.testing.assert_close(ready.q_scale, defined["q_scale"], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ready.k_scale, made.k_scale, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(ready.v_scale, made.v_scale, rtol=1e-5, atol=1e-9)
    assert sqnr_db(defined["branch"].float() - made.bias, ready.branch - made.bias) > 40


@pytest.mark.parametrize(
    ("rows", "order", "expected"),
    [
        (64, preparation.CHANNEL_ORDER, layout.channel_order()),
        (128, preparation.TOKEN_ORDER, layout.token_order()),
    ],
)
def test_tiles_are_read_back_as_the_tests_of_the_kernels_read_them(rows, order, expected):
    assert order == expected
    tiles = torch.randint(-127, 128, (3, 2, rows, 128), dtype=torch.int8)
    plain = layout.own_order(layout.unswizzled(tiles), order)
    assert torch.equal(preparation.read_back(tiles, order), plain)


class Stub:
    """In place of a compiled kernel: writes nothing."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def launch(self, grid: Any, threads: int, *arguments: Any) -> None:
        self.launched.append(self.name)


def test_each_kernel_of_the_preparation_is_launched_alone_checked_and_recorded(monkeypatch):
    from turbo_opt.kernels._cuda import prepare

    launched: list[str] = []
    monkeypatch.setattr(prepare, "load_kernel", lambda _, name, *others: Stub(name, launched))
    monkeypatch.setattr(Session, "runs", 1)
    session = Session(dry=True)
    made = preparation.operands(2, 200, CPU)
    written = {"k_int8", "v_fp8", "q_int8", "q_scale", "q_means", "branch"}
    for name in written:
        getattr(made, name).view(torch.uint8).zero_()
    for part in preparation.PARTS:
        launched.clear()
        part.launched(made)
        assert launched == [part.name]
        preparation._bench_part(session, part, [made, made], f"{part.name}/200x256")
    records: dict[str, Record] = {record.name: record for record in session.records}
    assert list(records) == [f"dry/{part.name}/200x256/share_of_copy" for part in preparation.PARTS]
    results = {part.name: part.defined(made) for part in preparation.PARTS}
    for record, each in zip(records.values(), results.values(), strict=True):
        assert set(record.quality) == {f"sqnr_db_{name}" for name in each}
        assert set(record.baseline) == {"torch_eager"}
    wrong = {failure.split(":")[0].rsplit("/", 1)[1] for failure in session.failures}
    assert wrong >= written  # all zero


def test_a_result_in_its_layout_is_as_it_is_defined():
    made = preparation.operands(2, 200, CPU)
    defined = preparation.PARTS[2].defined(made)
    parts = torch.stack([defined["state"] / 4, defined["state"] * 3 / 4], 1)
    written = {
        "k_int8": laid_out(defined["k_int8"], preparation.CHANNEL_ORDER),
        "v_fp8": laid_out(defined["v_fp8"].view(torch.uint8), preparation.TOKEN_ORDER).view(
            torch.float8_e4m3fn
        ),
        "state": parts,
        "key_sum": defined["key_sum"][:, None],
    }
    assert min(preparation.compared(defined, written, made.bias).values()) > 100


def laid_out(tiles: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Tiles as the kernels write them: chunks in order, chunk c of row r at place c ^ (r % 8)."""
    chunks = tiles[..., order].unflatten(-1, (8, 16))
    rows = [chunks[..., row, [c ^ row % 8 for c in range(8)], :] for row in range(tiles.shape[-2])]
    return torch.stack(rows, -3).flatten(-2).contiguous()
