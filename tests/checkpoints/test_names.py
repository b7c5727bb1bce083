"""Names there and back, for every parameter of every variant, and as diffusers converts them."""

from __future__ import annotations

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.variants import VARIANTS
from turbo_opt.checkpoints.names import (
    diffusers_name,
    is_kept_aside,
    is_weight,
    original_name,
    without_prefix,
)

UNKNOWN_TO_DIFFUSERS = "condition_embedder.image_embedder.pos_embed"


def parameters(variant):
    with init_empty_weights():
        model = getattr(diffusers, variant.model_class).from_config(variant.config)
    return [name for name, _ in model.named_parameters()]


EVERY = sorted({name for variant in VARIANTS.values() for name in parameters(variant)})


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_every_variant_goes_there_and_back(name):
    names = parameters(VARIANTS[name])
    originals = [original_name(parameter) for parameter in names]
    assert None not in originals
    assert len(set(originals)) == len(names)
    assert [diffusers_name(original) for original in originals] == names
    assert [diffusers_name(parameter) for parameter in names] == names


@pytest.mark.parametrize("name", VARIANTS)
def test_the_names_are_those_that_diffusers_converts(name):
    names = [item for item in parameters(VARIANTS[name]) if item != UNKNOWN_TO_DIFFUSERS]
    checkpoint = {original_name(item): torch.empty(2, device="meta") for item in names}
    converted = convert_wan_transformer_to_diffusers(checkpoint)
    assert set(converted) == set(names)


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("blocks.39.self_attn.o.bias", "blocks.39.attn1.to_out.0.bias"),
        ("blocks.0.norm3.weight", "blocks.0.norm2.weight"),
        ("blocks.0.modulation", "blocks.0.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
        ("vace_blocks.1.after_proj.weight", "vace_blocks.1.proj_out.weight"),
        ("img_emb.emb_pos", UNKNOWN_TO_DIFFUSERS),
        (
            "blocks.0.self_attn.attn_op.local_attn.proj_l.weight",
            "blocks.0.attn1.proj_l.weight",
        ),
        (
            "blocks.0.self_attn.attn_op.local_attn.router.proj_q.weight",
            "blocks.0.attn1.router.proj_q.weight",
        ),
        ("blocks.0.self_attn.attn_op.local_attn.alpha.bias", "blocks.0.attn1.alpha.bias"),
    ],
)
def test_names_of_the_original(original, expected):
    assert diffusers_name(original) == expected
    assert original_name(expected) == original


@pytest.mark.parametrize(
    "name",
    ["blocks.0.norm2.weight", "blocks.0.self_attn.z.weight", "blocks.x.norm3.weight", "", "."],
)
def test_other_names_stay_as_they_are(name):
    assert diffusers_name(name) == name


@given(
    st.lists(
        st.sampled_from(["net.", "model.", "model.diffusion_model.", "transformer."]), max_size=3
    ),
    st.sampled_from(EVERY),
)
def test_prefixes_come_off_in_any_number(prefixes, name):
    assert without_prefix("".join(prefixes) + name) == name
    assert without_prefix("".join(prefixes) + original_name(name)) == original_name(name)


def test_a_name_of_nothing_but_prefixes_ends():
    assert without_prefix("net." * 100_000) == ""


@given(st.text(max_size=40))
def test_any_text_is_a_name(text):
    assert isinstance(diffusers_name(without_prefix(text)), str)
    assert original_name(text) is None or diffusers_name(original_name(text)) == text


def test_projections_of_sparse_linear_attention_are_kept_aside():
    assert is_kept_aside("blocks.0.attn1.proj_l.weight")
    assert is_kept_aside("blocks.0.attn1.router.proj_k.weight")
    assert is_kept_aside("blocks.0.attn1.alpha.bias")
    assert not is_kept_aside("lora_unet_blocks_0_self_attn_q.alpha")
    assert not is_kept_aside("blocks.0.attn1.router.proj_q.bias")
    assert not is_kept_aside("blocks.0.attn1.to_q.weight")
    assert not is_kept_aside("proj_l.weights")


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_are_told_by_their_names_in_both_layouts(name):
    names = parameters(VARIANTS[name])
    assert all(map(is_weight, [*names, *map(original_name, names)]))


@pytest.mark.parametrize(
    "name",
    [
        "net.blocks.0.self_attn.q.weight",
        "blocks.0.self_attn.q.weight.exp_avg",
        "blocks.0.modulation.exp_avg",
        "blocks.0.modulation.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.self_attn.q",
        "encoder.weight",
        "step",
        "",
    ],
)
def test_other_names_are_no_weights(name):
    assert not is_weight(name)
