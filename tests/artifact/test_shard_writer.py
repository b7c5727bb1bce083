"""Shards are written by several threads, in bands of rows, and fail as one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turbo_opt.artifact import shard_writer
from turbo_opt.artifact.shard_writer import write_shard
from turbo_opt.artifact.shards import Shard, plan_shards
from turbo_opt.errors import BadInput, TurboOptError
from turbo_opt.ir import disk
from turbo_opt.ir.transforms import block_quantized, concatenated
from turbo_opt.ir.weights import (
    Band,
    LazyTensor,
    Transform,
    WeightStore,
    apply,
    cast,
    constant,
    from_file,
    register_transform,
)

SOURCES = 6
DTYPES = [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def source(tmp_path: Path) -> str:
    torch.manual_seed(0)
    tensors = {f"w{i}": torch.randn(300 + 128 * i, 256).bfloat16() for i in range(SOURCES)}
    path = tmp_path / "source.safetensors"
    save_file({**tensors, "a": torch.randn(256, 128), "b": torch.randn(130, 128)}, path)
    return str(path)


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bands of 128 rows, writes of 16 KiB; no thread of a writer outlives a test."""
    monkeypatch.setattr(shard_writer, "_BAND_BYTES", 2**16)
    monkeypatch.setattr(disk, "_BUFFER_BYTES", 2**14)
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
        whole = tensor.load()
        assert len(tensor.bands(2**16)) > 1
        assert torch.equal(written[name].view(torch.uint8), whole.view(torch.uint8)), name


@given(
    weights=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=8
    )
)
@settings(max_examples=30, deadline=None)
def test_every_tensor_lies_aligned_whatever_lies_before_it(
    weights: list[tuple[torch.dtype, list[int]]],
) -> None:
    store = WeightStore(
        {str(i): constant(torch.zeros(shape).to(dtype)) for i, (dtype, shape) in enumerate(weights)}
    )
    header = json.loads(_shard(store).header[8:])
    end = 0
    for name, entry in list(header.items())[1:]:
        begin, next_end = entry["data_offsets"]
        assert begin == end
        assert begin % store[name].dtype.itemsize == 0 or begin == next_end
        end = next_end
    assert set(header) - {"__metadata__"} == set(store)


def test_values_and_scales_of_odd_sizes_are_written_to_their_places(
    source: str, tmp_path: Path
) -> None:
    weights = WeightStore()
    for name, dtype in (("a", torch.float32), ("b", torch.float32), ("w0", torch.bfloat16)):
        pair = block_quantized(cast(from_file(source, name), dtype), "int8-block")
        weights[f"{name}.q"], weights[f"{name}.s"] = pair
    weights["wide"] = cast(from_file(source, "w1"), torch.float64)
    weights["odd"] = constant(torch.arange(3, dtype=torch.uint8))
    write_shard(_shard(weights), tmp_path / "w", lambda count: None)
    written = load_file(tmp_path / "w")
    for name, tensor in weights.items():
        assert torch.equal(written[name], tensor.load()), name


def test_the_digest_is_that_of_the_file(source: str, tmp_path: Path) -> None:
    digest = write_shard(_shard(_quantized(source)), tmp_path / "w", lambda count: None)
    assert digest == hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()


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
    monkeypatch.setattr(os, "preadv", lambda h, v, at: 0 if at > 2**17 else real(h, v, at))
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
    assert all(len(tensor.bands(1)) == 1 for tensor in weights.values())


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
    lock, held = threading.Lock(), weakref.WeakSet[torch.Tensor]()
    most = 0
    real = Band.load

    def watched(self: Band, memory: Any) -> Any:
        nonlocal most
        outputs = real(self, memory)
        with lock:
            for tensor in outputs:
                held.add(tensor)
            most = max(most, sum(tensor.nbytes for tensor in held))
        return outputs

    monkeypatch.setattr(Band, "load", watched)
    values, scales = block_quantized(from_file(str(path), "w"), "fp8-block")
    write_shard(_shard(WeightStore({"q": values, "s": scales})), tmp_path / "w", lambda n: None)
    workers = torch.get_num_threads() + 3
    assert 0 < most <= (2 * workers + 2) * 2.1 * 2**20 < values.nbytes


def _quantized(source: str) -> WeightStore:
    tensors: dict[str, LazyTensor] = {}
    for index in range(SOURCES):
        pair = block_quantized(from_file(source, f"w{index}"), "fp8-block")
        tensors |= {f"{index}.values": pair[0], f"{index}.scales": pair[1]}
    return WeightStore(tensors)


def _shard(weights: WeightStore) -> Shard:
    (shard,) = plan_shards(weights, "w", 2**30)
    return shard
