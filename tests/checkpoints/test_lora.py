"""LoRA files of every layout say the same; scales, whole changes, experts, and what is refused."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from accelerate import init_empty_weights

from tests.helpers.checkpoints import prefixed, write_safetensors
from tests.helpers.variants import VARIANTS
from turbo_opt.checkpoints.lora import _module_names, read_lora
from turbo_opt.checkpoints.names import original_name
from turbo_opt.errors import BadInput
from turbo_opt.ir.weights import constant

SHAPES = {
    "patch_embedding.weight": (8, 4, 1, 2, 2),
    "blocks.0.attn1.to_q.weight": (8, 8),
    "blocks.0.attn1.to_q.bias": (8,),
    "blocks.0.attn1.to_out.0.weight": (8, 8),
    "blocks.0.attn2.add_k_proj.weight": (8, 8),
    "blocks.0.attn2.norm_k.weight": (8,),
    "blocks.0.ffn.net.0.proj.weight": (32, 8),
    "blocks.0.ffn.net.2.weight": (8, 32),
    "blocks.0.scale_shift_table": (1, 6, 8),
    "condition_embedder.time_embedder.linear_1.weight": (8, 4),
    "proj_out.weight": (16, 8),
}
RANK = 2
MODULES = [name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2]


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(RANK, SHAPES[f"{module}.weight"][1], generator=generator),
            torch.randn(SHAPES[f"{module}.weight"][0], RANK, generator=generator),
        )
        for module in MODULES
    }


def original(module):
    return original_name(f"{module}.weight").removesuffix(".weight")


def as_layout(layout, alpha=None):
    """Tensors of one LoRA in a layout; `alpha` where it is written into the file."""
    peft = ("lora_A.default.weight", "lora_B.default.weight")
    down, up, rename = {
        "diffusers": ("lora_A.weight", "lora_B.weight", lambda m: f"transformer.{m}"),
        "peft": (*peft, lambda m: f"base_model.model.{m}"),
        "plain": ("lora.down.weight", "lora.up.weight", lambda m: m),
        "original": ("lora_A.weight", "lora_B.weight", lambda m: f"diffusion_model.{original(m)}"),
        "original-down": (
            "lora_down.weight", "lora_up.weight", lambda m: f"diffusion_model.{original(m)}",
        ),
        "kohya": (
            "lora_down.weight", "lora_up.weight",
            lambda m: "lora_unet_" + original(m).replace(".", "_"),
        ),
        "kohya-diffusers": (
            "lora_down.weight", "lora_up.weight",
            lambda m: "lora_transformer_" + m.replace(".", "_"),
        ),
    }[layout]  # fmt: skip
    tensors = {}
    for module, (a, b) in matrices().items():
        tensors[f"{rename(module)}.{down}"] = a
        tensors[f"{rename(module)}.{up}"] = b
        if alpha is not None:
            tensors[f"{rename(module)}.alpha"] = torch.tensor(alpha)
    return tensors


LAYOUTS = (
    "diffusers", "peft", "plain", "original", "original-down", "kohya", "kohya-diffusers",
)  # fmt: skip


def read(path, tensors, denoiser="transformer", alone=True, **metadata):
    return read_lora(write_safetensors(path, tensors, **metadata), denoiser, SHAPES, alone)


def delta(changes, name, strength=1.0):
    base = constant(torch.zeros(SHAPES[name]))
    for change in changes[name]:
        base = change.added_to(base, strength)
    return base.load()


@pytest.mark.parametrize("alpha", [None, 1.0, 4.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_the_same(tmp_path, layout, alpha):
    changes = read(tmp_path / "l.safetensors", as_layout(layout, alpha))
    assert set(changes) == {f"{module}.weight" for module in MODULES}
    scale = 1.0 if alpha is None else alpha / RANK
    for module, (a, b) in matrices().items():
        torch.testing.assert_close(delta(changes, f"{module}.weight", 0.5), 0.5 * scale * (b @ a))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_two_modules_of_a_variant_share_a_flat_name(name):
    variant = VARIANTS[name]
    with init_empty_weights():
        model = getattr(diffusers, variant.model_class).from_config(variant.config)
    weights = [parameter for parameter, _ in model.named_parameters()]
    names = _module_names(weights)
    for weight in weights:
        module = weight.removesuffix(".weight").removesuffix(".bias")
        for written in (weight, original_name(weight)):
            flat = written.removesuffix(".weight").removesuffix(".bias").replace(".", "_")
            assert names[flat] == module


def test_a_convolution_takes_matrices_in_its_own_shape_or_flat(tmp_path):
    a, b = torch.randn(RANK, 4, 1, 2, 2), torch.randn(8, RANK, 1, 1, 1)
    stem = "diffusion_model.patch_embedding"
    expected = torch.einsum("or,rchij->ochij", b[:, :, 0, 0, 0], a[:, :, :].reshape(a.shape))
    for down, up in ((a, b), (a.flatten(1), b.flatten(1))):
        changes = read(
            tmp_path / "l.safetensors",
            {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up},
        )
        torch.testing.assert_close(delta(changes, "patch_embedding.weight"), expected)


def test_whole_changes_of_weights_biases_norms_and_modulation(tmp_path):
    parts = {
        "blocks.0.self_attn.q.diff": torch.randn(8, 8),
        "blocks.0.self_attn.q.diff_b": torch.randn(8),
        "blocks.0.cross_attn.norm_k.diff": torch.randn(8),
        "blocks.0.diff_m": torch.randn(1, 6, 8),
        "patch_embedding.diff": torch.randn(8, 4, 1, 2, 2),
    }
    changes = read(tmp_path / "l.safetensors", prefixed("diffusion_model.", parts))
    expected = {
        "blocks.0.attn1.to_q.weight": "blocks.0.self_attn.q.diff",
        "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.0.attn2.norm_k.weight": "blocks.0.cross_attn.norm_k.diff",
        "blocks.0.scale_shift_table": "blocks.0.diff_m",
        "patch_embedding.weight": "patch_embedding.diff",
    }
    assert set(changes) == set(expected)
    for name, part in expected.items():
        assert torch.equal(delta(changes, name, 0.5), 0.5 * parts[part])


def test_a_bias_of_b_has_the_scale_of_the_matrices(tmp_path):
    tensors = as_layout("diffusers", alpha=6.0)
    tensors["transformer.blocks.0.attn1.to_q.lora_B.bias"] = bias = torch.randn(8)
    changes = read(tmp_path / "l.safetensors", tensors)
    torch.testing.assert_close(delta(changes, "blocks.0.attn1.to_q.bias"), 3.0 * bias)


SETTINGS = [
    ({"r": 2, "lora_alpha": 8}, 4.0, 4.0),
    ({"r": 2, "lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5, 8 / 2**0.5),
    ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 1.0, 4.0),
    ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"n1.to_q": 2}}, 4.0, 4.0),
    ({"r": 2}, 1.0, 1.0),
]


@pytest.mark.parametrize(("settings", "of_q", "of_out"), SETTINGS)
@pytest.mark.parametrize("place", ["beside", "metadata", "metadata-prefixed"])
def test_alpha_may_come_from_the_adapters_config(tmp_path, place, settings, of_q, of_out):
    metadata = {}
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        stem = "transformer." if place == "metadata-prefixed" else ""
        text = json.dumps({f"{stem}{key}": value for key, value in settings.items()})
        metadata = {"lora_adapter_metadata": text}
    changes = read(tmp_path / "adapter_model.safetensors", as_layout("peft"), **metadata)
    for module, scale in (("blocks.0.attn1.to_q", of_q), ("blocks.0.attn1.to_out.0", of_out)):
        a, b = matrices()[module]
        torch.testing.assert_close(delta(changes, f"{module}.weight"), scale * (b @ a))


def test_a_config_beside_another_file_is_not_its_own(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8}))
    changes = read(tmp_path / "other.safetensors", as_layout("peft"))
    a, b = matrices()["blocks.0.attn1.to_q"]
    torch.testing.assert_close(delta(changes, "blocks.0.attn1.to_q.weight"), b @ a)


def test_a_file_for_both_experts_is_split_by_its_names(tmp_path):
    tensors = {}
    for expert, module in (("transformer", "proj_out"), ("transformer_2", "blocks.0.attn1.to_q")):
        for part, matrix in zip("AB", matrices()[module], strict=True):
            tensors[f"{expert}.{module}.lora_{part}.weight"] = matrix
    path = tmp_path / "l.safetensors"
    assert set(read(path, tensors, alone=False)) == {"proj_out.weight"}
    low = read(path, tensors, "transformer_2", alone=False)
    assert set(low) == {"blocks.0.attn1.to_q.weight"}
    with pytest.raises(BadInput, match="is for two experts, transformer and transformer_2"):
        read(path, tensors)
    with pytest.raises(BadInput, match=r"which expert it is for \(blocks.*and 9 more"):
        read(path, as_layout("plain"), alone=False)


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("added", "removed", "message"),
    [
        (
            {"diffusion_model.blocks.0.self_attn.z.lora_A.weight": torch.ones(2, 2)},
            (),
            r"1 of 22 names are of no LoRA of this model: \S+z.lora_A.weight, did you mean 'blocks",
        ),
        ({"lora_te_text_model.alpha": torch.ones(())}, (), "model: lora_te_text_model.alpha"),
        ({f"{Q}.dora_scale": torch.ones(8, 1)}, (), "model: diff.*self_attn.q.dora_scale"),
        ({f"{Q}.hada_w1_a": torch.ones(8, 1)}, (), "model: diff.*self_attn.q.hada_w1_a"),
        ({}, ("B",), "'blocks.0.attn1.to_q' has no up matrix"),
        ({}, ("A",), "'blocks.0.attn1.to_q' has no down matrix"),
        ({}, ("A", "B"), "'blocks.0.attn1.to_q' has neither lora_A nor lora_B"),
        (
            {f"{Q}.lora_B.weight": torch.ones(8, 3)},
            (),
            r"A is \[2, 8\] and B is \[8, 3\]: they share no rank",
        ),
        ({f"{Q}.lora_A.weight": torch.ones(())}, (), r"A is \[\] and B .* they share no rank"),
        (
            {f"{Q}.lora_A.weight": torch.ones(2, 9)},
            (),
            r"changes 'blocks.0.attn1.to_q.weight' by \[8, 9\], the model's is \[8, 8\]",
        ),
        (
            {f"{Q}.diff_b": torch.ones(9)},
            (),
            r"changes 'blocks.0.attn1.to_q.bias' by \[9\], the model's is \[8\]",
        ),
        ({f"{Q}.alpha": torch.ones(2)}, (), r"alpha of .* is no number: \[2\]"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, (), "must be a number, it is nan"),
        (
            {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 8)},
            (),
            "is a second 'down' of 'blocks.0.attn1.to_q'",
        ),
        (
            {"diffusion_model.head.head.diff_b": torch.ones(16)},
            (),
            "changes 'proj_out.bias', which the model has not",
        ),
    ],
)
def test_what_fits_no_weight_or_is_not_whole_is_named(tmp_path, added, removed, message):
    tensors = as_layout("original", alpha=2.0) | added
    for part in removed:
        del tensors[f"{Q}.lora_{part}.weight"]
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "l.safetensors", tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": "much"}, "must be a number, it is 'much'"),
        ({"use_dora": True}, "is a DoRA"),
        ("[]", "its metadata 'lora_adapter_metadata' is no JSON object"),
        ("{", "its metadata 'lora_adapter_metadata' is no JSON object"),
    ],
)
def test_an_adapters_config_that_makes_no_sense_is_refused(tmp_path, settings, message):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "l.safetensors", as_layout("peft"), lora_adapter_metadata=text)
