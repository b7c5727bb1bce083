"""Files of 8-bit weights: read as the numbers they stand for, and quantized as they were."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoints import (
    in_original_names,
    prefixed,
    projections,
    with_linear_patch_embedding,
    write_safetensors,
)
from tests.passes.exchanges import program_of, random_weights, run
from turbo_opt.calibration.convert import convert, read_weights
from turbo_opt.checkpoints.reader import read_network
from turbo_opt.errors import BadInput
from turbo_opt.ir.transforms import block_dequantized, block_quantized, concatenated
from turbo_opt.ir.weights import cast, constant, from_json, to_json
from turbo_opt.kernels.block_quantize import dequantize_weight, quantize_weight

LINEAR = ".attn1.to_", ".attn2.to_", ".ffn.net."


def is_linear(name):
    return name.endswith(".weight") and any(part in name for part in LINEAR)


def in_blocks(tensors):
    """As TurboDiffusion's `-quant.pth`: linear layers of blocks as int8_weight and scale."""
    flat = with_linear_patch_embedding(in_original_names(tensors))
    linear = in_original_names({name: value for name, value in tensors.items() if is_linear(name)})
    assert linear
    for name, value in linear.items():
        layer = name.removesuffix(".weight")
        del flat[name]
        flat[f"{layer}.int8_weight"], flat[f"{layer}.scale"] = quantize_weight(value, "int8-block")
    return flat


def in_fp8(tensors, scale_shape=()):
    """As ComfyUI's FP8 files: all linear layers of blocks in e4m3, with a scale beside each."""
    found = in_original_names(tensors)
    for name in list(found):
        if any(part in name for part in (".self_attn.q.weight", ".ffn.0.weight")):
            scale = (found[name].abs().max() / 448).reshape(scale_shape)
            found[name] = (found[name] / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".scale_weight")] = scale
            found[name.replace(".weight", ".scale_input")] = torch.ones(scale_shape)
    mark = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    return prefixed("model.diffusion_model.", found) | mark


@pytest.fixture(scope="module")
def program():
    return program_of("t2v", torch.bfloat16)


@pytest.fixture(scope="module")
def student(program):
    return random_weights(program, 1)


def test_weights_in_int8_blocks_are_read_as_the_numbers_they_stand_for(student, tmp_path):
    tuned = student | projections(2)
    path = tmp_path / "student-quant.pth"
    torch.save(in_blocks(tuned), path)
    found = read_network(path).tensors
    assert found.keys() == tuned.keys()
    for name, value in tuned.items():
        if is_linear(name):
            value = dequantize_weight(*quantize_weight(value, "int8-block"))
            assert found[name].dtype == torch.float32
        assert torch.equal(found[name].load().reshape(value.shape), value), name


def test_quantizing_them_again_keeps_every_integer_and_scale(program, student, tmp_path):
    path = tmp_path / "student-quant.pth"
    stored = in_blocks(student)
    torch.save(stored, path)
    passes = "canonicalize,fuse-norms,quantize-linear{scheme=int8-block},fuse-qkv"
    after = run(program, f"distill-steps{{weights=student student=assume}},{passes}", student=path)
    (denoiser,) = after
    weights = {name: tensor.load() for name, tensor in denoiser.weights.items()}
    ffn = "blocks.1.ffn.net.2"
    assert torch.equal(weights[f"{ffn}.quantized_weight"], stored["blocks.1.ffn.2.int8_weight"])
    assert torch.equal(weights[f"{ffn}.weight_scale"], stored["blocks.1.ffn.2.scale"])
    together = [stored[f"blocks.1.self_attn.{part}.int8_weight"] for part in "qkv"]
    assert any(torch.equal(value, torch.cat(together)) for value in weights.values())
    # Numbers rounded anew would not be the same: the largest of a block is 127 of 128 steps.
    again = quantize_weight(
        dequantize_weight(stored["blocks.1.ffn.2.int8_weight"], stored["blocks.1.ffn.2.scale"]),
        "int8-block",
    )
    assert not torch.equal(again[1], stored["blocks.1.ffn.2.scale"])


def test_another_scheme_or_a_merge_in_between_quantizes_the_numbers(student):
    weight = student["blocks.0.ffn.net.2.weight"]
    values, scales = (constant(part) for part in quantize_weight(weight, "int8-block"))
    read = cast(block_dequantized(values, scales), torch.bfloat16)
    kept = block_quantized(read, "int8-block")
    assert kept == (values, scales)
    other = block_quantized(read, "fp8-block")[0].load()
    assert torch.equal(other, quantize_weight(read.load(), "fp8-block")[0])
    joined = block_quantized(concatenated(read, read), "int8-block")[0]
    assert joined.op == "block-quantize" and joined.load().shape[0] == 2 * weight.shape[0]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_blocks_may_be_cut_off_at_both_edges_and_go_through_a_cache(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator)
    lazy = block_dequantized(constant(values), constant(scales))
    row, column = torch.arange(rows) // 128, torch.arange(columns) // 128
    expected = values * scales[row[:, None], column]
    assert torch.equal(lazy.load(), expected)
    assert torch.equal(from_json(json.loads(json.dumps(to_json(lazy)))).load(), expected)


@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_fp8_weights_are_multiplied_by_their_scale(student, tmp_path, scale_shape):
    stored = in_fp8(student, scale_shape)
    path = write_safetensors(tmp_path / "fp8.safetensors", stored)
    found = read_network(path).tensors
    assert found.keys() == student.keys()
    prefix = "model.diffusion_model.blocks.0.self_attn.q."
    values, scale = stored[f"{prefix}weight"], stored[f"{prefix}scale_weight"]
    tensor = found["blocks.0.attn1.to_q.weight"]
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor.load(), values.float() * scale)
    bias = "blocks.0.attn1.to_q.bias"
    assert torch.equal(found[bias].load(), student[bias])


def test_fp8_weights_without_a_scale_and_with_one_for_each_row(tmp_path):
    values = torch.randn(6, 4).to(torch.float8_e5m2)
    rows = torch.rand(6, 1)
    plain = {"head.head.weight": values, "blocks.0.ffn.0.weight": values.clone()}
    path = write_safetensors(
        tmp_path / "f.safetensors", plain | {"blocks.0.ffn.0.scale_weight": rows}
    )
    found = read_network(path).tensors
    assert torch.equal(found["proj_out.weight"].load(), values.float())
    assert torch.equal(found["blocks.0.ffn.net.0.proj.weight"].load(), values.float() * rows)


def test_a_scale_counts_beside_a_weight_in_16_bits_too(tmp_path):
    weight = torch.randn(6, 4).bfloat16()
    stored = {"head.head.weight": weight, "head.head.scale_weight": torch.tensor(0.5)}
    found = read_network(write_safetensors(tmp_path / "f.safetensors", stored)).tensors
    assert found.keys() == {"proj_out.weight"}
    assert torch.equal(found["proj_out.weight"].load(), 0.5 * weight.float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"blocks.0.ffn.0.int8_weight": torch.zeros(256, 128, dtype=torch.int8)},
            "'blocks.0.ffn.0.int8_weight' has no 'blocks.0.ffn.0.scale' beside it",
        ),
        (
            {
                "blocks.0.ffn.0.int8_weight": torch.zeros(256, 130, dtype=torch.int8),
                "blocks.0.ffn.0.scale": torch.ones(2, 1),
            },
            r"float32 of shape \[2, 1\]; \[256, 130\] in blocks of 128×128 has \[2, 2\]",
        ),
        (
            {
                "blocks.0.ffn.0.int8_weight": torch.zeros(4, 4),
                "blocks.0.ffn.0.scale": torch.ones(1, 1),
            },
            r"is float32 of shape \[4, 4\]; weights in blocks are int8 \(out, in\)",
        ),
        (
            {
                "blocks.0.ffn.0.int8_weight": torch.zeros(4, 4, dtype=torch.int8),
                "blocks.0.ffn.0.scale": torch.ones(1, 1),
                "blocks.0.ffn.0.weight": torch.zeros(4, 4),
            },
            "are both the weight 'blocks.0.ffn.0.weight'",
        ),
        (
            {
                "blocks.0.ffn.0.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
                "blocks.0.ffn.0.scale_weight": torch.ones(3),
            },
            r"the scale of 'blocks.0.ffn.0.weight' is float32 of shape \[3\]; one number, or one "
            "for each of 4 rows",
        ),
        (
            {"blocks.0.ffn.0.qweight": torch.zeros(4, 4, dtype=torch.uint8)},
            "'blocks.0.ffn.0.qweight' is uint8, so the weights are quantized in a form that is not "
            "read; those that are: TurboDiffusion's",
        ),
    ],
)
def test_a_damaged_or_unknown_form_is_refused(tmp_path, tensors, message):
    path = write_safetensors(tmp_path / "q.safetensors", tensors)
    with pytest.raises(BadInput, match=message):
        read_network(path)


def test_converting_writes_the_numbers(student, tmp_path):
    source = tmp_path / "student-quant.pth"
    torch.save(in_blocks(student), source)
    convert(source, tmp_path / "student.safetensors")
    found = read_weights(tmp_path / "student.safetensors")
    name = "blocks.0.ffn.net.2.weight"
    expected = dequantize_weight(*quantize_weight(student[name], "int8-block"))
    assert torch.equal(found[name], expected)
