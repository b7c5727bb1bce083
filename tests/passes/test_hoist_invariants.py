"""hoist-invariants: what is kept of every Wan variant, what is not and why, in any order."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.variants import VARIANTS, captured_program
from tests.passes.graphs import program_of
from turbo_opt.compiler.storage import read_program, write_program
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import user_inputs
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.stages import Stage, is_number, split

QUANTIZED = "canonicalize,fuse-norms,quantize-linear,fuse-norm-quantize"
LAYERS = {"t2v": 2, "i2v": 2, "i2v-without-image-tokens": 2, "flf2v": 2, "vace": 4, "ti2v": 2}


def kept_shapes(program, stage):
    """Shapes without batch of the tensors that a stage keeps."""
    (denoiser,) = program
    found = split(denoiser.graph, user_inputs(denoiser.exported), denoiser.stages)
    return [tuple(n.meta["val"].shape)[1:] for n in found.kept[stage] if not is_number(n)]


@pytest.mark.parametrize("pipeline", ["canonicalize", QUANTIZED])
@pytest.mark.parametrize("name", VARIANTS)
def test_keys_values_and_modulation_of_every_layer_are_kept(optimize, name, pipeline):
    after = optimize(captured_program(VARIANTS[name]), f"{pipeline},hoist-invariants", "off")
    (denoiser,) = after
    keys_and_values = kept_shapes(after, Stage.PROMPT)
    sources = 2 if VARIANTS[name].config.get("image_dim") else 1
    assert len(keys_and_values) == 2 * sources * LAYERS[name]
    assert all(shape[-1] == 256 for shape in keys_and_values)
    modulation = kept_shapes(after, Stage.TIMESTEP)
    if name == "ti2v":
        assert modulation == []
    else:
        assert modulation.count((6, 256)) == LAYERS[name]
    stats = after.history[-1]["stats"]
    per_layer = LAYERS[name] * 2 * sources
    embeddings = 2 + (2 if sources == 2 else 0) + (0 if name == "ti2v" else 3)
    assert stats["linear_layers_hoisted"] == per_layer + embeddings
    assert stats["shape_bytes"] >= 2 * 75600 * 128 * 4
    assert after.history[-1]["matches"] == len(keys_and_values) + len(modulation) + len(
        kept_shapes(after, Stage.SHAPE)
    )
    assert Fact.INVARIANTS_HOISTED in after.facts
    assert denoiser.stages["prompt"][0] == "encoder_hidden_states"


def test_the_graph_itself_does_not_change(optimize):
    before = optimize(captured_program(VARIANTS["t2v"]), QUANTIZED, "off")
    after = optimize(captured_program(VARIANTS["t2v"]), f"{QUANTIZED},hoist-invariants", "off")
    assert after.history[-1]["op_count_change"] == {"transformer": {}}
    assert list(map(str, before.denoisers["transformer"].graph.nodes)) == list(
        map(str, after.denoisers["transformer"].graph.nodes)
    )


def test_a_timestep_per_token_is_a_near_miss_with_the_reason(optimize):
    after = optimize(captured_program(VARIANTS["ti2v"]), "canonicalize,hoist-invariants", "off")
    (miss,) = after.history[-1]["near_misses"]
    assert "one timestep per token" in miss["reason"]
    assert after.denoisers["transformer"].stages["timestep"] == ()


def test_later_passes_move_the_boundary_with_them(optimize):
    first = optimize(
        captured_program(VARIANTS["t2v"]),
        "canonicalize,hoist-invariants,fuse-norms,quantize-linear,fuse-norm-quantize",
        "off",
    )
    last = optimize(captured_program(VARIANTS["t2v"]), f"{QUANTIZED},hoist-invariants", "off")
    for stage in (Stage.SHAPE, Stage.PROMPT, Stage.TIMESTEP):
        assert kept_shapes(first, stage) == kept_shapes(last, stage)


def test_options_leave_a_stage_in_the_step(optimize):
    after = optimize(
        captured_program(VARIANTS["t2v"]), "canonicalize,hoist-invariants{prompt=false}", "off"
    )
    assert after.denoisers["transformer"].stages == {"prompt": (), "timestep": ("timestep",)}
    assert kept_shapes(after, Stage.PROMPT) == []


def test_a_graph_that_writes_in_place_stays_whole(optimize):
    def net(x):
        return torch.zeros_like(x).copy_(x)

    after = optimize(program_of(net, torch.randn(2, 3)), "canonicalize,hoist-invariants?", "off")
    assert "writes in place" in after.history[-1]["near_misses"][0]["reason"]
    assert after.denoisers["net"].stages == {}


def test_without_canonicalize_the_error_says_what_to_add(optimize):
    with pytest.raises(BadInput, match="add 'canonicalize' before 'hoist-invariants'"):
        optimize(captured_program(VARIANTS["t2v"]), "hoist-invariants")


def test_stages_are_part_of_what_the_pass_cache_stores_and_tells_apart(optimize, tmp_path):
    before = optimize(captured_program(VARIANTS["t2v"]), "canonicalize", "off")
    after = optimize(captured_program(VARIANTS["t2v"]), "canonicalize,hoist-invariants", "off")
    assert before.denoisers["transformer"].digest() != after.denoisers["transformer"].digest()
    write_program(after, tmp_path)
    stored = read_program(tmp_path)
    assert stored.denoisers["transformer"].stages == after.denoisers["transformer"].stages
    assert kept_shapes(stored, Stage.PROMPT)
