"""Tensor maps: how Hopper's copy engine finds a box of a tensor in global memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from .compiler import _check, _driver

_ALIGNMENT = 64
_UINT8, _NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_256_BYTES, _FILL_ZERO = 0, 0, 3, 3, 0


class TensorMap(ctypes.Structure):
    """The driver's `CUtensorMap`: 128 bytes, opaque, passed to a kernel by value."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


@functools.lru_cache(maxsize=1024)
def encode(
    address: int, sides: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """The map of a tensor of bytes, whose boxes land swizzled in rows of 128 bytes.

    Args:
        address: of the first byte, a multiple of 16.
        sides: the innermost first, at most five; their elements lie one byte apart along the first.
        strides: in bytes, of all sides but the first, multiples of 16.
        box: sides of what one copy brings, 128 bytes along the first.

    Raises:
        KernelError: the driver refuses them.
    """
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + _ALIGNMENT)
    encoded = TensorMap.from_buffer(memory, -ctypes.addressof(memory) % _ALIGNMENT)
    rank = len(sides)
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(encoded), _UINT8, ctypes.c_uint32(rank), ctypes.c_void_p(address),
            _array(ctypes.c_uint64, sides), _array(ctypes.c_uint64, strides),
            _array(ctypes.c_uint32, box), _array(ctypes.c_uint32, [1] * rank),
            _NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_256_BYTES, _FILL_ZERO,
        )
    )  # fmt: skip
    return encoded


def _array(kind: type[ctypes.c_uint32] | type[ctypes.c_uint64], values: Sequence[int]) -> object:
    return (kind * len(values))(*values)
