"""Files are written in order and hashed, read in pieces, past the cache where that is possible."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbo_opt.ir import disk
from turbo_opt.ir.disk import SequentialFile, new_pages, read_bytes

CONTENT = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_BUFFER_BYTES", 2**13)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A file that the system does not hold in memory, where it can be told to forget."""
    path = tmp_path / "stored"
    path.write_bytes(CONTENT)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@given(sizes=st.lists(st.integers(0, 3 * 2**13), max_size=12))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_file_is_what_was_written_in_pieces_of_any_size(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    digest = _write(tmp_path / "file", pieces)
    whole = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("refused_by", ["open", "pwrite"])
def test_a_file_system_without_direct_writes_is_written_through_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_by: str
) -> None:
    real_open, real_pwrite, direct, refused = os.open, os.pwrite, set[int](), []

    def refuse() -> None:
        refused.append(refused_by)
        raise OSError(errno.EINVAL, "Invalid argument")

    def open_(path: Any, flags: int, *rest: Any) -> int:
        if not flags & disk._DIRECT:
            return real_open(path, flags, *rest)
        if refused_by == "open":
            refuse()
        direct.add(handle := real_open(path, flags, *rest))
        return handle

    def pwrite(handle: int, *rest: Any) -> int:
        if handle in direct:
            refuse()
        return real_pwrite(handle, *rest)

    monkeypatch.setattr(disk, "_DIRECT", os.O_DIRECT)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    _write(tmp_path / "file", [CONTENT, b"tail"])
    assert (tmp_path / "file").read_bytes() == CONTENT + b"tail"
    assert refused


def test_the_buffer_of_a_piece_may_be_used_again_at_once(tmp_path: Path) -> None:
    piece = bytearray(5000)
    with ThreadPoolExecutor(1) as pool, SequentialFile(tmp_path / "file", pool) as file:
        for value in range(50):
            piece[:] = bytes([value]) * len(piece)
            file.write(memoryview(piece))
        file.close()
    expected = b"".join(bytes([value]) * len(piece) for value in range(50))
    assert (tmp_path / "file").read_bytes() == expected


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_full_disk_is_the_error_of_who_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    real, calls = os.pwrite, iter(range(10**6))

    def full(*args: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "file", [CONTENT])


@given(position=st.integers(0, len(CONTENT)), count=st.integers(0, len(CONTENT)))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("direct", [True, False])
def test_any_stretch_is_read_and_fewer_bytes_where_the_file_ends(
    stored: Path, direct: bool, position: int, count: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_LEAST_BYTES", 1)
        patch.setattr(disk, "_is_cached", lambda *_: False)
        if not direct:
            patch.setattr(disk, "_DIRECT", 0)
        read = read_bytes(str(stored), position, count, new_pages(count))
    assert read.numpy().tobytes() == CONTENT[position : position + count]


def test_a_direct_read_that_fails_half_way_is_finished_through_the_cache(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def half(handle: int, views: list[memoryview], position: int) -> int:
        calls.append(position)
        if len(calls) == 1:
            return real(handle, [views[0][: 2**19]], position)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(handle, views, position)

    monkeypatch.setattr(disk, "_is_cached", lambda *_: False)
    monkeypatch.setattr(os, "preadv", half)
    read = read_bytes(str(stored), 100, 2**20, new_pages(2**20))
    assert read.numpy().tobytes() == CONTENT[100 : 100 + 2**20]
    assert len(calls) == 3


def test_a_direct_read_leaves_the_cache_as_it_was(stored: Path) -> None:
    if disk._is_cached(str(stored), 0, len(CONTENT)):
        pytest.skip("this file system keeps its files in memory")
    read_bytes(str(stored), 0, len(CONTENT), new_pages(len(CONTENT)))
    assert not disk._is_cached(str(stored), 0, len(CONTENT))
    stored.read_bytes()
    assert disk._is_cached(str(stored), 0, len(CONTENT))
    assert not disk._is_cached(str(stored.with_name("absent")), 0, 4096)


def _write(path: Path, pieces: list[bytes]) -> str:
    with ThreadPoolExecutor(1) as pool, SequentialFile(path, pool) as file:
        for piece in pieces:
            file.write(memoryview(piece))
        assert file.position == sum(map(len, pieces))
        return file.close()
