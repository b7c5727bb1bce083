"""Compile CUDA C++ with NVRTC, keep the result on disk, and launch it.

NVRTC comes inside PyTorch's CUDA wheels, so nothing has to be installed. Compiled kernels are kept
in `$TURBO_OPT_KERNEL_CACHE`, by default `turbo_opt/kernels` in the user's cache folder, under a
digest of source, options and compiler; a later process loads them in a millisecond.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import KernelError

CACHE_VARIABLE = "TURBO_OPT_KERNEL_CACHE"
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_HERE = Path(__file__).parent


class Long(int):
    """An argument that the kernel takes as `long long`."""


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class Kernel:
    """A compiled kernel, loaded on one device."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int) -> None:
        driver = _driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._shared_bytes = shared_bytes
        _check(driver.cuModuleLoadData(ctypes.byref(self._module), cubin))
        _check(
            driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
        )
        _check(
            driver.cuFuncSetAttribute(
                self._function, _MAX_DYNAMIC_SHARED_SIZE, ctypes.c_int(shared_bytes)
            )
        )

    def launch(self, grid: Sequence[int], threads: int, *arguments: Any) -> None:
        """Start it on torch's current stream.

        Args:
            grid: programs along x, and along y if there are two.
            threads: per program.
            arguments: tensors and None are passed as pointers, int as int, Long as long long,
                float as float, a ctypes structure by value.
        """
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
        )
        x, y = (*grid, 1)[:2]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            _driver().cuLaunchKernel(
                self._function, x, y, 1, threads, 1, 1, self._shared_bytes, stream, pointers, None
            )
        )

    def resident_clusters(self, threads: int, programs: int) -> int:
        """How many of its clusters, of so many programs, a device runs at once.

        Raises:
            KernelError: a cluster does not fit on the device.
        """
        config = _LaunchConfig((programs, 1, 1), (threads, 1, 1), self._shared_bytes)
        clusters = ctypes.c_int()
        _check(
            _driver().cuOccupancyMaxActiveClusters(
                ctypes.byref(clusters), self._function, ctypes.byref(config)
            )
        )
        if not clusters.value:
            raise KernelError(
                f"a cluster of {programs} programs of {threads} threads and {self._shared_bytes} "
                "bytes of shared memory does not fit on the device"
            )
        return clusters.value


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot compile CUDA C++, in a clause; None if it can."""
    try:
        _version()
    except (KernelError, OSError) as error:
        return str(error)
    return None


@functools.cache
def load_kernel(
    source: str,
    name: str,
    architecture: str,
    device: int,
    defines: tuple[tuple[str, int], ...] = (),
    shared_bytes: int = 0,
) -> Kernel:
    """The kernel `name` of the file `source` beside this one, loaded on a CUDA device.

    Args:
        source: files joined by `+`, such as `common.cuh+rows.cu`.
        architecture: such as `sm_90a`.
        defines: macros for the preprocessor.
        shared_bytes: dynamic shared memory of a program.

    Raises:
        KernelError: it does not compile, or the driver refuses it.
    """
    text = "\n".join((_HERE / file).read_text() for file in source.split("+"))
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context current
        return Kernel(compiled(text, architecture, dict(defines)), name, shared_bytes)


def compiled(text: str, architecture: str, defines: Mapping[str, int]) -> bytes:
    """The binary of a source, from the cache or by compiling it."""
    options = [f"-arch={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    key = hashlib.sha256("\0".join([text, *options, _version()]).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    binary = _compile(text, options)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        _write_whole(path, binary)
    return binary


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "turbo_opt" / "kernels"


def _write_whole(path: Path, binary: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(binary)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _compile(text: str, options: Sequence[str]) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check_nvrtc(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    )
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        if failed:
            log = _text_of(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise KernelError(f"NVRTC cannot compile a CUDA kernel:\n{log.decode()}")
        return _text_of(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text_of(program: ctypes.c_void_p, size_of: Any, copy: Any) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check_nvrtc(copy(program, buffer))
    return buffer.raw


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch's own NVRTC, or the system's."""
    if torch.version.cuda is None:
        raise KernelError("PyTorch is built without CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    packages = Path(torch.__file__).parent.parent / "nvidia"
    found = sorted(packages.glob(f"*/lib/{name}")) if packages.is_dir() else []
    for candidate in (name, *(str(path) for path in found)):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(candidate)
    raise KernelError(f"{name} was not found; it is part of PyTorch's CUDA wheels")


@functools.cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return value
    if isinstance(value, Long):
        return ctypes.c_longlong(value)
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"CUDA driver: {(text.value or b'unknown error').decode()}")


def _check_nvrtc(status: int) -> None:
    if status:
        _nvrtc().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise KernelError(f"NVRTC: {_nvrtc().nvrtcGetErrorString(status).decode()}")
