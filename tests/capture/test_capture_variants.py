"""A captured graph computes what diffusers computes, at sizes other than the one captured."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import (
    VARIANTS,
    captured_program,
    compiled,
    random_inputs,
    random_model,
)
from turbo_opt.capture.export import export_denoiser
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import parameter_names, user_inputs


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(2, 3, 8, 12), (1, 1, 4, 8)], ids=str)
def test_captured_graph_equals_diffusers_in_float32(name, size):
    variant = VARIANTS[name]
    inputs = random_inputs(variant, *size)
    with torch.no_grad():
        expected = random_model(variant, torch.float32)(**inputs).sample
        result = compiled(captured_program(variant))(**inputs).sample
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_captured_graph_equals_diffusers_in_bfloat16_with_its_float32_modules():
    variant = VARIANTS["t2v"]
    inputs = random_inputs(variant, 1, 2, 8, 8, torch.bfloat16)
    with torch.no_grad():
        expected = random_model(variant, torch.bfloat16)(**inputs).sample
        result = compiled(captured_program(variant, torch.bfloat16))(**inputs).sample
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)


def test_a_graph_holds_no_weights_and_names_every_one_it_reads():
    (denoiser,) = captured_program(VARIANTS["t2v"])
    assert all(tensor.is_meta for tensor in denoiser.exported.state_dict.values())
    assert not denoiser.exported.constants
    assert set(parameter_names(denoiser.exported).values()) == set(denoiser.weights)
    assert {"rope.freqs_cos", "rope.freqs_sin"} <= set(denoiser.weights)


def test_user_inputs_come_in_the_order_of_the_diffusers_call():
    (denoiser,) = captured_program(VARIANTS["vace"])
    names = [node.target for node in user_inputs(denoiser.exported)]
    assert names[:3] == ["hidden_states", "timestep", "encoder_hidden_states"]
    assert {"control_hidden_states", "control_hidden_states_scale"} == set(names[3:])


def test_a_config_of_another_model_is_refused():
    with pytest.raises(BadInput, match="does not describe a WanTransformer3DModel"):
        export_denoiser(
            "WanTransformer3DModel", {"attention_head_dim": "wide"}, torch.float32, False
        )


def test_compiled_transformer_says_which_inputs_it_takes():
    variant = VARIANTS["i2v"]
    inputs = random_inputs(variant, 1, 1, 4, 4)
    del inputs["encoder_hidden_states_image"]
    with pytest.raises(ValueError, match="encoder_hidden_states_image"):
        compiled(captured_program(variant))(**inputs)


def test_compiled_transformer_refuses_a_latent_that_is_no_multiple_of_the_patch():
    variant = VARIANTS["t2v"]
    inputs = random_inputs(variant, 1, 1, 4, 4)
    inputs["hidden_states"] = torch.randn(1, 16, 1, 5, 4)
    with pytest.raises(ValueError, match="latent H = 5 is not a multiple of the patch 2"):
        compiled(captured_program(variant))(**inputs)
