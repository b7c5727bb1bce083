"""What a sample's files hold: named tensors, from bytes of which nothing is trusted."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from turbo_opt.errors import BadInput

LATENTS, PROMPT_EMBEDS = "latents", "prompt_embeds"
LARGEST_SAMPLE = 2**31
"""Bytes that a sample may have."""
_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def parse_safetensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        BadInput: it is none, or cut off.
    """
    try:
        return load_safetensors(content)
    except KeyError as error:
        raise BadInput(
            f"holds a tensor of {error}, which is not read; F16, BF16 and F32 are"
        ) from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"is no safetensors file ({reason})") from None


def parse_npy(content: bytes) -> Tensor:
    """The array of an .npy file of floating-point numbers, as float32.

    Raises:
        BadInput: it is none, cut off, or holds anything else: numbers of another kind, or objects,
            which would be a pickle.
    """
    file = io.BytesIO(content)
    try:
        version = npy.read_magic(file)
        shape, by_columns, dtype = _NPY_HEADERS[version](file)
    except Exception as error:  # a header is Python text, and numpy lets all its faults through
        raise BadInput(f"is no .npy file of version 1 or 2 ({error})") from None
    if dtype.kind != "f":
        raise BadInput(f"is an .npy file of {dtype}, must be floating point")
    expected, found = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if min(shape, default=1) < 0 or expected != found:
        raise BadInput(
            f"is an .npy file of shape {_text(shape)} with {found} bytes, not {expected}"
        )
    array = np.frombuffer(content, dtype, offset=file.tell())
    with np.errstate(over="ignore"):  # what does not fit is infinite, and refused as that
        values = array.astype(np.float32)
    try:
        values = values.reshape(shape, order="F" if by_columns else "C")
    except (ValueError, TypeError) as error:  # more or longer sides than can be
        raise BadInput(f"is an .npy file of a shape that no array has ({error})") from None
    return torch.from_numpy(np.ascontiguousarray(values))


def checked(tensors: dict[str, Tensor], name: str, shape: Sequence[int | None]) -> Tensor:
    """The tensor of that name in float32, if it is one to learn from.

    Args:
        shape: that it must have; None for any number.

    Raises:
        BadInput: it is missing, of another shape, of integers, or not finite.
    """
    if name not in tensors:
        raise BadInput(f"has no {name!r}, only {', '.join(sorted(tensors)) or 'nothing'}")
    tensor = tensors[name]
    fits = tensor.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise BadInput(f"{name} has shape {_text(tensor.shape)}, must be {_text(shape)}")
    if not tensor.is_floating_point():
        raise BadInput(f"{name} is {tensor.dtype}, must be floating point")
    values = tensor.float()  # float64 may hold what float32 does not
    if not values.isfinite().all():
        raise BadInput(f"{name} holds values that are not finite")
    return values


def _text(shape: Iterable[int | None]) -> str:
    return "×".join("any" if side is None else str(side) for side in shape)
