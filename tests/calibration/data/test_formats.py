"""Files of a sample: numbers come back as they are, and nothing but numbers is read."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from turbo_opt.calibration.data.formats import checked, parse_npy, parse_safetensors
from turbo_opt.errors import BadInput


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from(["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]),
        arrays.array_shapes(min_dims=0, max_dims=4, max_side=5),
    ),
    st.booleans(),
    st.sampled_from([(1, 0), (2, 0)]),
)
def test_arrays_come_back_in_float32_whatever_their_order(array, by_columns, version) -> None:
    stored = np.asarray(array, order="F" if by_columns else "C")
    found = parse_npy(npy(stored, version))
    with np.errstate(over="ignore"):
        expected = array.astype(np.float32)
    np.testing.assert_array_equal(found.numpy(), expected)


class RunsCode:
    def __reduce__(self):
        return (pytest.fail, ("code of a file was run",))


def with_header(text: str) -> bytes:
    """An .npy file with nothing behind its header."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def header_of(shape: str, dtype: str = "<f4") -> bytes:
    return with_header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (npy(np.zeros((2, 3), np.float32))[:-1], "shape 2×3 with 23 bytes, not 24"),
        (npy(np.zeros(3, np.float32)) + b"more", "with 16 bytes, not 12"),
        (npy(np.zeros(3, np.int64)), "is an .npy file of int64, must be floating point"),
        (npy(np.zeros(3, np.complex64)), "must be floating point"),
        (npy(np.array([RunsCode()], dtype=object)), "is an .npy file of object"),
        (npy(np.zeros(3, [("a", "<f4")])), "must be floating point"),
        (header_of("(99999999999, 99999999999)"), "with 0 bytes, not"),
        (header_of("(-1, -4)") + bytes(16), "not 16|is no .npy"),
        (header_of(f"(0, {10**30})"), "of a shape that no array has"),
        (header_of(f"({'1,' * 100})") + bytes(4), "of a shape that no array has"),
        (header_of("(True,)") + bytes(4), "of a shape that no array has"),
        (header_of("(1,)", "<f3") + bytes(3), "is no .npy file"),
        (header_of("__import__('os')"), "is no .npy file"),
        (with_header("{1: 2, 'a': 3}"), "is no .npy file"),
        (with_header("{("), "is no .npy file"),
        (with_header("(" * 9000), "is no .npy file"),
        (pickle.dumps(RunsCode()), "is no .npy file"),
        (b"PK\x03\x04 an archive of arrays", "is no .npy file"),
        (b"\x93NUMPY\x03\x00" + bytes(60), "is no .npy file of version 1 or 2"),
        (b"", "is no .npy file"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        parse_npy(content)


def safetensors(dtype: str, shape: list[int], data: bytes) -> bytes:
    said = {"latents": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    header = json.dumps(said).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors("F8_E8M0", [4], bytes(4)), "holds a tensor of 'F8_E8M0', which is not read"),
        (safetensors("F32", [0, 2**62, 8], b""), "is no safetensors file"),
        (safetensors("F32", [0, 2**63], b""), "is no safetensors file"),
    ],
)
def test_safetensors_that_are_no_tensors_of_pytorch_are_refused(content, reason) -> None:
    with pytest.raises(BadInput, match=reason):
        parse_safetensors(content)


def test_numbers_of_8_bits_are_floating_point_too() -> None:
    stored = torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn)
    content = safetensors("F8_E4M3", [2], stored.view(torch.uint8).numpy().tobytes())
    assert checked(parse_safetensors(content), "latents", (2,)).tolist() == [0.5, -2.0]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(content: bytes) -> None:
    for head in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x76\x00{"):
        for parse in (parse_npy, parse_safetensors):
            try:
                parse(head + content)
            except BadInput:
                continue


@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_what_float32_does_not_hold_is_not_finite(kind) -> None:
    array = np.array([1e300])
    tensors = (
        {"latents": parse_npy(npy(array))}
        if kind == "npy"
        else parse_safetensors(safetensors("F64", [1], array.tobytes()))
    )
    with pytest.raises(BadInput, match="latents holds values that are not finite"):
        checked(tensors, "latents", (1,))


def test_any_number_is_none_in_a_shape() -> None:
    tensors = {"latents": torch.zeros(2, 3)}
    assert checked(tensors, "latents", (None, 3)) is tensors["latents"]
    with pytest.raises(BadInput, match=r"latents has shape 2×3, must be any×4"):
        checked(tensors, "latents", (None, 4))
    with pytest.raises(BadInput, match=r"has no 'prompt_embeds', only latents"):
        checked(tensors, "prompt_embeds", (None, 4))
