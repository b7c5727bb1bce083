"""Compiled CUDA kernels: where they are kept, and that a kept one is not compiled again."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from turbo_opt.kernels import Capability, KernelError
from turbo_opt.kernels._cuda import compiler, sparse_attention

SOURCE = 'extern "C" __global__ void nothing() {}'


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """What was compiled, as (text, options); each compilation gives other bytes."""
    calls = []

    def compile_once(text, options):
        calls.append((text, list(options)))
        return f"binary {len(calls)}".encode()

    monkeypatch.setattr(compiler, "_compile", compile_once)
    monkeypatch.setattr(compiler, "_version", lambda: "12.8")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    return calls


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"TURBO_OPT_KERNEL_CACHE": "/a/b"}, "/a/b"),
        ({"TURBO_OPT_KERNEL_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"TURBO_OPT_KERNEL_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/turbo_opt/kernels"),
        ({"HOME": "/home/me"}, "/home/me/.cache/turbo_opt/kernels"),
    ],
)
def test_the_cache_is_where_the_environment_says(environment, folder, monkeypatch):
    for name in ("TURBO_OPT_KERNEL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compiler.cache_folder() == Path(folder)


def test_a_kept_binary_is_not_compiled_again(compilations):
    first = compiler.compiled(SOURCE, "sm_90a", {"STAGES": 2})
    assert first == b"binary 1" == compiler.compiled(SOURCE, "sm_90a", {"STAGES": 2})
    assert compilations == [(SOURCE, ["-arch=sm_90a", "--std=c++17", "-DSTAGES=2"])]


def test_another_source_option_architecture_or_compiler_is_compiled_anew(compilations, monkeypatch):
    for text, architecture, defines in (
        (SOURCE, "sm_90a", {}),
        (SOURCE + " ", "sm_90a", {}),
        (SOURCE, "sm_100a", {}),
        (SOURCE, "sm_90a", {"STAGES": 3}),
    ):
        compiler.compiled(text, architecture, defines)
    monkeypatch.setattr(compiler, "_version", lambda: "13.0")
    compiler.compiled(SOURCE, "sm_90a", {})
    assert len(compilations) == 5
    assert len(list(compiler.cache_folder().glob("*.cubin"))) == 5


def test_a_cache_that_cannot_be_written_is_done_without(compilations, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    assert compiler.compiled(SOURCE, "sm_90a", {}) == b"binary 1"
    assert compiler.compiled(SOURCE, "sm_90a", {}) == b"binary 2"


def test_a_binary_appears_whole_or_not_at_all(compilations, monkeypatch):
    moves, move = [], os.replace

    def watched(source, target):
        moves.append((Path(source).read_bytes(), Path(source).parent, Path(target).exists()))
        move(source, target)

    monkeypatch.setattr(os, "replace", watched)
    compiler.compiled(SOURCE, "sm_90a", {})
    assert moves == [(b"binary 1", compiler.cache_folder(), False)]
    assert [path.suffix for path in compiler.cache_folder().iterdir()] == [".cubin"]


def test_an_interrupted_write_leaves_no_binary(compilations, monkeypatch):
    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    assert compiler.compiled(SOURCE, "sm_90a", {}) == b"binary 1"
    assert not list(compiler.cache_folder().glob("*.cubin"))


def test_a_machine_without_nvrtc_is_told_where_it_comes_from(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(KernelError, match=r"libnvrtc\.so\.12 .* part of PyTorch's CUDA wheels"):
        compiler._nvrtc.__wrapped__()


def test_a_pytorch_without_cuda_has_no_compiler(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(KernelError, match="PyTorch is built without CUDA"):
        compiler._nvrtc.__wrapped__()


def test_arguments_are_passed_as_the_kernel_declares_them():
    tensor = torch.empty(3)
    assert compiler._argument(None).value is None
    assert compiler._argument(tensor).value == tensor.data_ptr()
    assert isinstance(compiler._argument(7), ctypes.c_int)
    assert isinstance(compiler._argument(0.5), ctypes.c_float)


def test_the_sources_lie_beside_the_compiler():
    assert (
        "sparse_attention(" in (Path(compiler.__file__).parent / "sparse_attention.cu").read_text()
    )


@pytest.mark.parametrize(
    ("capability", "serves"),
    [
        (Capability("sm", 9, 0), True),
        (Capability("sm", 8, 9), False),
        (Capability("sm", 10, 0), False),
        (Capability("sm", 12, 0), False),
        (Capability("cpu"), False),
        (Capability("rocm"), False),
    ],
)
def test_only_hopper_is_served(capability, serves):
    assert (sparse_attention.unsupported(capability) is None) is serves


def test_the_cuda_provider_is_not_offered_where_nothing_can_be_compiled(monkeypatch):
    assert compiler.unavailable.__wrapped__() is None or not torch.version.cuda
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(compiler, "_version", compiler._nvrtc.__wrapped__)
    assert compiler.unavailable.__wrapped__() == "PyTorch is built without CUDA"


@pytest.mark.gpu
def test_a_kernel_that_does_not_compile_shows_the_compilers_words(monkeypatch, tmp_path):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(KernelError, match="NVRTC cannot compile"):
        compiler.compiled("nonsense", "sm_90a", {})


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [2, 8])
def test_clusters_that_run_at_once_are_counted(programs, device):
    """Programs of 1024 threads, of which a multiprocessor runs two."""
    text = f'extern "C" __global__ void __cluster_dims__({programs}, 1, 1) nothing() {{}}'
    kernel = compiler.Kernel(compiler.compiled(text, "sm_90a", {}), "nothing", 0)
    most = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    clusters = kernel.resident_clusters(1024, programs)
    assert most / 2 <= clusters * programs <= most
    kernel.launch((clusters * programs,), 1024)
    torch.cuda.synchronize()
