"""merge-weights: the difference of two checkpoints, LoRA, what is kept, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoints import (
    projections,
    write_layout,
    write_safetensors,
    write_sharded_folder,
)
from tests.passes.exchanges import part_of, program_of, random_weights, run, weights_of
from turbo_opt.artifact.save import save
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.storage import read_program, write_program
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.errors import BadInput
from turbo_opt.ir.weights import from_json, to_json

DIFFERENCE = "merge-weights{target=target reference=reference}"
Q = "blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def program():
    return program_of("t2v", torch.bfloat16)


@pytest.fixture(scope="module")
def sides(program):
    return random_weights(program, 1), random_weights(program, 2)


def merged(base, target, reference, weight):
    """W + w·(target − reference) in float32, rounded to the base's dtype."""
    return {
        name: (base[name].float() + weight * (target[name] - reference[name])).to(base[name].dtype)
        for name in target
    }


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_the_difference_is_added_in_float32_and_rounded_once(program, sides, tmp_path, weight):
    target, reference = sides
    places = {
        "target": write_layout("rcm", tmp_path / "target", target),
        "reference": write_layout("diffusers-folder", tmp_path / "reference", reference),
    }
    text = f"merge-weights{{target=target reference=reference weight={weight}}}"
    after = run(program, text, **places)
    base, found = weights_of(program), weights_of(after)
    for name, value in merged(base, target, reference, weight).items():
        assert torch.equal(found[name], value), name
    for name in base.keys() - target.keys():
        assert torch.equal(found[name], base[name])
    assert after.history[-1]["stats"]["merged"] == len(target)
    assert after.history[-1]["numerics"] == "retrained"


def test_nothing_is_added_where_the_weight_is_zero_or_the_sides_are_equal(program, sides, tmp_path):
    place = write_layout("original", tmp_path / "side", sides[0])
    for text in ("target=s reference=s", "target=s reference=s weight=0"):
        after = run(program, f"merge-weights{{{text}}}", s=place)
        for name, value in weights_of(program).items():
            assert torch.equal(weights_of(after)[name], value)


def test_projections_of_the_target_are_kept_and_found_by_sparse_attention(program, sides, tmp_path):
    target, reference = sides
    places = {
        "target": write_layout("turbodiffusion", tmp_path / "t", target | projections(2)),
        "reference": write_layout("original", tmp_path / "r", reference),
    }
    after = run(program, f"{DIFFERENCE},canonicalize,sparse-attention{{topk=0.5}}", **places)
    (denoiser,) = after
    for name, value in projections(2).items():
        assert denoiser.weights[name].dtype == torch.float32
        assert torch.equal(denoiser.weights[name].load(), value)
    assert after.history[0]["stats"]["kept_aside"] == 4
    with pytest.raises(BadInput, match=r"sparse-attention needs weights named blocks.0.attn1.proj"):
        run(program, "canonicalize,sparse-attention")


def test_projections_that_base_target_and_reference_have_are_merged(program, sides, tmp_path):
    tuned = {"student": write_layout("rcm", tmp_path / "s", sides[0] | projections(2))}
    kept = run(program, "distill-steps{weights=student student=assume}", **tuned)
    places = {
        "target": write_layout("rcm", tmp_path / "t", sides[0] | projections(2, seed=1)),
        "reference": write_layout("rcm", tmp_path / "r", sides[1] | projections(2, seed=2)),
    }
    (after,) = run(kept, DIFFERENCE, **places)
    base, one, other = projections(2), projections(2, seed=1), projections(2, seed=2)
    for name, value in base.items():
        assert torch.equal(after.unread[name].load(), value + (one[name] - other[name]))


def test_what_only_some_have_is_reported(program, sides, tmp_path):
    target, reference = sides
    shared = part_of(target, 10)
    (place_t, place_r) = (tmp_path / "t.safetensors", tmp_path / "r.safetensors")
    more = {"blocks.0.router.weight": torch.ones(2), "rope.freqs_cos": torch.ones(2)}
    write_safetensors(place_t, shared | more)
    write_safetensors(place_r, {n: reference[n] for n in shared} | {"old.bias": torch.ones(2)})
    after = run(program, DIFFERENCE, target=place_t, reference=place_r)
    reasons = {miss["reason"]: miss for miss in after.history[-1]["near_misses"]}
    assert {reason: miss["count"] for reason, miss in reasons.items()} == {
        "neither target nor reference has it: it stays as it is": len(target) - 10,
        "only the reference has it: it is left out": 1,
        "the model computes it itself: it is left out": 1,
        "only the target has it: it is kept for passes, and saved only where one reads it": 1,
    }
    assert after.history[-1]["stats"] == {
        "merged": 10, "kept_aside": 1, "lora": 0, "only_in_the_base": len(target) - 10,
    }  # fmt: skip
    assert "blocks.0.router.weight" in after.denoisers["transformer"].unread


@pytest.mark.parametrize(
    ("in_target", "in_reference", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if n != Q},
            lambda t: t,
            f"t.safetensors lacks 1 weights that transformer and .*r.safetensors have: {Q}; target "
            "and reference are one network .*: `turbo-opt calibrate sla` writes the target",
        ),
        (
            lambda t: t,
            lambda t: {n: v for n, v in t.items() if not n.startswith("blocks.1.attn2")},
            r"r.safetensors lacks 10 weights that .* have: blocks.1.attn2.* and 5 more",
        ),
        (
            lambda t: t | {Q: torch.ones(256, 255)},
            lambda t: t,
            rf"t.safetensors, for transformer: 1 weights are of other shapes: {Q} is \[256, 255\]",
        ),
        (
            lambda t: t,
            lambda t: t | {Q: torch.ones(2)},
            "r.safetensors, for transformer: 1 weights",
        ),
        (
            lambda t: {f"other.{n}": v for n, v in t.items()},
            lambda t: {f"other.{n}": v for n, v in t.items()},
            "has no weight of transformer, only the likes of other.blocks.0.*; target and",
        ),
    ],
)
def test_sides_that_do_not_fit_are_told_by_name(
    program, sides, tmp_path, in_target, in_reference, message
):
    places = {
        "target": write_safetensors(tmp_path / "t.safetensors", in_target(sides[0])),
        "reference": write_safetensors(tmp_path / "r.safetensors", in_reference(sides[1])),
    }
    with pytest.raises(BadInput, match=message):
        run(program, DIFFERENCE, **places)


def lora(program, rank, seed, stem="transformer."):
    """A LoRA of every linear layer of the blocks; name → change of that weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors, changes = {}, {}
    for name, value in weights_of(program).items():
        if value.ndim == 2 and name.startswith("blocks.") and name.endswith(".weight"):
            module = stem + name.removesuffix(".weight")
            a = tensors[f"{module}.lora_A.weight"] = torch.randn(
                rank, value.shape[1], generator=generator
            )
            b = tensors[f"{module}.lora_B.weight"] = torch.randn(
                value.shape[0], rank, generator=generator
            )
            changes[name] = b @ a
    return tensors, changes


def test_several_lora_and_a_difference_make_one_sum(program, sides, tmp_path):
    target, reference = sides
    one, change_one = lora(program, 4, 3)
    two, change_two = lora(program, 2, 4, stem="base_model.model.")
    (tmp_path / "two").mkdir()
    config = {"r": 2, "lora_alpha": 6}
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps(config))
    places = {
        "target": write_layout("diffusers", tmp_path / "t", target),
        "reference": write_layout("diffusers", tmp_path / "r", reference),
        "one": write_safetensors(tmp_path / "one.safetensors", one),
        "two": write_safetensors(tmp_path / "two" / "adapter_model.safetensors", two).parent,
    }
    loras = "[{weights=one scale=0.75}, {weights=two}]"
    text = f"merge-weights{{target=target reference=reference weight=0.5 loras={loras}}}"
    after = run(program, text, **places)
    base, found = weights_of(program), weights_of(after)
    for name in target:
        expected = base[name].float() + 0.5 * (target[name] - reference[name])
        if name in change_one:
            expected = expected + 0.75 * change_one[name] + 3 * change_two[name]
        torch.testing.assert_close(found[name], expected.to(base[name].dtype))
    assert after.history[-1]["stats"]["lora"] == len(change_one)


def test_sums_of_several_passes_round_once(program, sides, tmp_path):
    target, reference = sides
    places = {
        "target": write_layout("diffusers", tmp_path / "t", target),
        "reference": write_layout("diffusers", tmp_path / "r", reference),
    }
    third = f"merge-weights{{target=target reference=reference weight={1 / 3}}}"
    (before,), (after,) = program, run(program, f"{third},{third},{third}", **places)
    base, once = before.weights[Q].load(), after.weights[Q].load()
    assert once.dtype == torch.bfloat16
    whole = base.float() + (target[Q] - reference[Q])
    assert (once == whole.bfloat16()).float().mean() > 0.99
    thrice = base
    for _ in range(3):
        thrice = (thrice.float() + (target[Q] - reference[Q]) / 3).bfloat16()
    assert (thrice == whole.bfloat16()).float().mean() < 0.9


def test_lora_of_a_pair_of_experts_in_one_file_or_for_one_of_them(tmp_path):
    program = program_of("t2v", torch.bfloat16, experts=2)
    high, change_high = lora(program, 2, 1)
    low, change_low = lora(program, 2, 2, stem="transformer_2.")
    plain = {name.removeprefix("transformer."): value for name, value in high.items()}
    places = {
        "both": write_safetensors(tmp_path / "both.safetensors", high | low),
        "plain": write_safetensors(tmp_path / "plain.safetensors", plain),
    }

    def changed(text, name):
        after = run(program, f"merge-weights{{loras=[{{weights={text}}}]}}", **places)
        return after.denoisers[name].weights[Q].load()

    base = program.denoisers["transformer"].weights[Q].load()
    with_high, with_low = (
        (base.float() + change[Q]).bfloat16() for change in (change_high, change_low)
    )
    torch.testing.assert_close(changed("both", "transformer"), with_high)
    torch.testing.assert_close(changed("both", "transformer_2"), with_low)
    assert torch.equal(changed("{transformer_2=plain}", "transformer"), base)
    torch.testing.assert_close(changed("{transformer_2=plain}", "transformer_2"), with_high)
    with pytest.raises(BadInput, match="does not say which expert it is for"):
        changed("plain", "transformer")


def test_names_of_a_lora_that_fit_no_weight_are_told(program, tmp_path):
    tensors, _ = lora(program, 2, 1)
    tensors["transformer.blocks.7.attn1.to_q.lora_A.weight"] = torch.ones(2, 256)
    path = write_safetensors(tmp_path / "l.safetensors", tensors)
    with pytest.raises(BadInput, match=r"1 of \d+ names are of no LoRA of this model: \S+blocks.7"):
        run(program, "merge-weights{loras=[{weights=l}]}", l=path)


def test_difference_of_a_pair_of_experts(tmp_path):
    program = program_of("t2v", torch.bfloat16, experts=2)
    for side, seed in (("t", 1), ("r", 2)):
        for index, name in enumerate(program.denoisers):
            weights = random_weights(program, seed + 10 * index, name)
            write_sharded_folder(tmp_path / side / name, weights)
    after = run(program, DIFFERENCE, target=tmp_path / "t", reference=tmp_path / "r")
    for index, name in enumerate(program.denoisers):
        target = random_weights(program, 1 + 10 * index, name)
        reference = random_weights(program, 2 + 10 * index, name)
        base, found = (item.denoisers[name].weights[Q].load() for item in (program, after))
        assert torch.equal(found, (base.float() + (target[Q] - reference[Q])).bfloat16())


def test_sums_are_saved_in_bands_stored_and_told_apart(program, sides, tmp_path):
    tensors, _ = lora(program, 4, 3)
    places = {
        "target": write_layout("rcm", tmp_path / "t", sides[0]),
        "reference": write_layout("original", tmp_path / "r", sides[1]),
        "style": write_safetensors(tmp_path / "style.safetensors", tensors),
    }
    base = {"student": write_layout("diffusers", tmp_path / "base", random_weights(program, 7))}
    program = run(program, "distill-steps{weights=student student=assume}", **base)
    text = "merge-weights{target=target reference=reference loras=[{weights=style}]}"
    after = run(program, text, **places)
    (denoiser,) = after
    tensor = denoiser.weights[Q]
    assert len(list(tensor.bands(2**14))) > 4
    assert from_json(json.loads(json.dumps(to_json(tensor)))).digest == tensor.digest
    (tmp_path / "stored").mkdir()
    write_program(after, tmp_path / "stored")
    assert read_program(tmp_path / "stored").digest() == after.digest()
    heavier = run(program, text.replace("}]", " scale=0.5}]"), **places)
    assert heavier.digest() != after.digest()
    root = save(after, tmp_path / "out", replay=False)
    stored = {k: v for path in root.rglob("*.safetensors") for k, v in load_file(path).items()}
    for name, value in weights_of(after).items():
        torch.testing.assert_close(stored[name], value)


def test_options_are_checked_before_any_work():
    for text, message in (
        ("merge-weights", "nothing to merge: give target and reference, or loras"),
        ("merge-weights{target=a}", "target and reference are given together"),
        ("merge-weights{loras=[{weights=a}] weight=2}", "weight is the factor of target"),
        ("merge-weights{loras=[{weights=a strength=2}]}", "strength"),
        ("canonicalize,quantize-linear,merge-weights{loras=[{weights=a}]}", "'linear-quantized'"),
    ):
        with pytest.raises(BadInput, match=message):
            validate_pipeline(parse_pipeline(text))
