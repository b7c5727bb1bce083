"""Shards are written by several threads, in bands of rows, and fail as one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from turbo_opt.artifact import shard_writer
from turbo_opt.artifact.shard_writer import write_shard
from turbo_opt.artifact.shards import Shard, plan_shards
from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.ir.transforms import block_quantized, concatenated
from turbo_opt.ir.weights import (
    LazyTensor,
    Transform,
    WeightStore,
    apply,
    cast,
    from_file,
    register_transform,
)

SOURCES = 6


@pytest.fixture
def source(tmp_path: Path) -> str:
    torch.manual_seed(0)
    tensors = {f"w{i}": torch.randn(300 + 128 * i, 256).bfloat16() for i in range(SOURCES)}
    path = tmp_path / "source.safetensors"
    save_file({**tensors, "a": torch.randn(256, 128), "b": torch.randn(130, 128)}, path)
    return str(path)


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bands of 128 rows; no thread of a writer outlives a test."""
    monkeypatch.setattr(shard_writer, "_BAND_BYTES", 2**16)
    yield
    assert threading.active_count() == 1 or not any(
        thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate()
    )


def test_what_comes_in_bands_is_what_is_computed_whole(source: str, tmp_path: Path) -> None:
    weights = _quantized(source)
    joined = concatenated(from_file(source, "a"), from_file(source, "b"))
    weights["joined.q"], weights["joined.s"] = block_quantized(joined, "fp8-block")
    weights["cast"] = cast(from_file(source, "a"), torch.float16)
    write_shard(_shard(weights), tmp_path / "w", lambda count: None)
    written = load_file(tmp_path / "w")
    for name, tensor in weights.items():
        assert tensor.comes_in_bands
        whole = tensor.load()
        assert len(list(tensor.bands(2**16))) > 1
        assert torch.equal(written[name].view(torch.uint8), whole.view(torch.uint8)), name


def test_progress_is_told_in_the_calling_thread_and_adds_up(source: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    weights = _quantized(source)
    write_shard(
        _shard(weights), tmp_path / "w",
        lambda count: seen.append((threading.get_ident(), count)),
    )  # fmt: skip
    assert {thread for thread, _ in seen} == {threading.get_ident()}
    assert sum(count for _, count in seen) == weights.nbytes
    assert len(seen) == SOURCES


@pytest.mark.parametrize("after", [1, 5, 20])
def test_a_failing_write_in_a_thread_is_the_error_of_the_caller(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, calls = os.pwrite, iter(range(10**6))

    def full(*args: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(_shard(_quantized(source)), tmp_path / "w", lambda count: None)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_that_shrinks_meanwhile_is_bad_input(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda h, v, at, f: 0 if at > 2**17 else real(h, v, at, f))
    with pytest.raises(BadInput, match="truncated inside tensor"):
        write_shard(_shard(_quantized(source)), tmp_path / "w", lambda count: None)


def test_stopping_while_threads_work_ends_them(source: str, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(_shard(_quantized(source)), tmp_path / "w", stop)


def test_a_weight_with_a_row_too_many_never_overwrites_its_neighbour(
    source: str, tmp_path: Path
) -> None:
    register_transform(
        Transform(
            "test-grow",
            lambda x: [(x.shape, x.dtype)],
            lambda x: [torch.cat([x, x[:1]])],
            rows=1,
        )
    )
    weights = WeightStore({"liar": apply("test-grow", from_file(source, "w0"))[0]})
    with pytest.raises(TurboOptError, match="weight 'liar' came out as"):
        write_shard(_shard(weights), tmp_path / "w", lambda count: None)


def test_what_needs_all_rows_is_held_one_at_a_time(source: str, tmp_path: Path) -> None:
    inside, most = threading.Semaphore(1), []

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        most.append(inside.acquire(blocking=False))
        threading.Event().wait(0.01)
        inside.release()
        return [x.flip(0)]

    register_transform(Transform("test-flip", lambda x: [(x.shape, x.dtype)], compute))
    weights = WeightStore({
        f"w{i}": apply("test-flip", from_file(source, f"w{i}"))[0] for i in range(SOURCES)
    })  # fmt: skip
    write_shard(_shard(weights), tmp_path / "w", lambda count: None)
    assert most == [True] * SOURCES
    assert not any(tensor.comes_in_bands for tensor in weights.values())


def test_threads_of_torch_are_as_many_as_before(source: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    write_shard(_shard(_quantized(source)), tmp_path / "w", lambda count: None)
    assert torch.get_num_threads() == before
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_large_weight_passes_through_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"w": torch.zeros(64 * 1024, 1024, dtype=torch.bfloat16)}, path)
    monkeypatch.setattr(shard_writer, "_BAND_BYTES", 4 * 2**20)
    largest = 0
    real = LazyTensor.bands

    def watched(self: LazyTensor, most_bytes: int) -> Iterator[Any]:
        nonlocal largest
        for outputs in real(self, most_bytes):
            largest = max(largest, sum(tensor.nbytes for tensor in outputs))
            yield outputs

    monkeypatch.setattr(LazyTensor, "bands", watched)
    values, scales = block_quantized(from_file(str(path), "w"), "fp8-block")
    write_shard(_shard(WeightStore({"q": values, "s": scales})), tmp_path / "w", lambda n: None)
    assert 0 < largest <= 2.1 * 2**20


def _quantized(source: str) -> WeightStore:
    tensors: dict[str, LazyTensor] = {}
    for index in range(SOURCES):
        pair = block_quantized(from_file(source, f"w{index}"), "fp8-block")
        tensors |= {f"{index}.values": pair[0], f"{index}.scales": pair[1]}
    return WeightStore(tensors)


def _shard(weights: WeightStore) -> Shard:
    (shard,) = plan_shards(weights, "w", 2**30)
    return shard
