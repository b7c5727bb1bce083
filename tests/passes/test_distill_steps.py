"""distill-steps: weights of every layout, the schedule, experts, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers.checkpoints import (
    LAYOUTS,
    projections,
    write_layout,
    write_safetensors,
    write_sharded_folder,
)
from tests.passes.exchanges import assert_weights, part_of, program_of, random_weights, run
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.errors import BadInput
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.rcm import rcm_schedule

ASSUMED = "distill-steps{weights=student student=assume}"


@pytest.fixture(scope="module")
def program():
    return program_of("t2v")


@pytest.fixture(scope="module")
def student(program):
    return random_weights(program, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_of_every_layout_takes_the_place_of_the_weights(
    program, student, tmp_path, layout
):
    tuned = student | projections(2)
    after = run(program, ASSUMED, student=write_layout(layout, tmp_path / "student", tuned))
    assert_weights(after, student, "transformer")
    (old,), (new,) = program, after
    assert set(new.weights) == set(old.weights)
    assert {name: tensor.load().tolist() for name, tensor in new.unread.items()} == {
        name: tensor.tolist() for name, tensor in projections(2).items()
    }
    assert not old.unread
    assert after.history[-1]["matches"] == len(tuned)


@pytest.mark.parametrize(("name", "sigma_max"), [("flf2v", 200.0), ("vace", 80.0)])
def test_other_variants_take_a_student_too(tmp_path, name, sigma_max):
    program = program_of(name)
    student = random_weights(program, 1)
    after = run(program, ASSUMED, student=write_layout("rcm", tmp_path / "student", student))
    assert_weights(after, student, "transformer")
    assert after.history[-1]["stats"]["sigma_max"] == sigma_max


def test_the_schedule_becomes_the_students(program, student, tmp_path):
    place = write_layout("rcm", tmp_path / "student", student)
    after = run(program, ASSUMED, student=place)
    assert after.schedule == rcm_schedule(4, 80.0, "sde")
    assert after.facts == {Fact.DISTILLED}
    options = "weights=student student=assume steps=2 rule=ode sigma_max=1600"
    fewer = run(program, f"distill-steps{{{options}}}", student=place)
    assert fewer.schedule == rcm_schedule(2, 1600.0, "ode")
    assert fewer.history[-1]["stats"] == {
        "evaluations_before": program.schedule.evaluations,
        "evaluations_after": 2,
        "sigma_max": 1600.0,
        "kept_aside": 0,
    }


def test_a_declared_student_needs_no_assumption_and_says_its_noise_level(
    program, student, tmp_path
):
    path = tmp_path / "student.safetensors"
    write_safetensors(path, student, distillation="rcm", sigma_max="120")
    after = run(program, "distill-steps{weights=student}", student=path)
    assert after.schedule == rcm_schedule(4, 120.0, "sde")
    written = run(program, "distill-steps{weights=student sigma_max=200}", student=path)
    assert written.schedule == rcm_schedule(4, 200.0, "sde")


def test_weights_that_do_not_say_they_are_distilled_are_refused(program, student, tmp_path):
    place = write_layout("turbodiffusion", tmp_path / "student", student)
    with pytest.raises(BadInput) as error:
        run(program, "distill-steps{weights=student}", student=place)
    assert "does not say that it is a distilled student, by `distillation: rcm`" in str(error.value)
    assert "`student: assume` takes it; `turbo-opt calibrate rcm` makes one" in str(error.value)
    place.with_suffix(".json").write_text(json.dumps({"distillation": "rcm"}))
    assert run(program, "distill-steps{weights=student}", student=place).schedule.evaluations == 4


def test_a_pair_of_experts_takes_a_student_each_and_switches_at_its_boundary(tmp_path):
    program = program_of("flf2v", experts=2)
    high, low = random_weights(program, 1), random_weights(program, 2)
    places = {
        "high": write_layout("rcm", tmp_path / "high", high),
        "low": write_layout("original", tmp_path / "low", low),
    }
    options = "weights={transformer=high transformer_2=low} student=assume"
    after = run(program, f"distill-steps{{{options}}}", **places)
    assert_weights(after, high, "transformer")
    assert_weights(after, low, "transformer_2")
    assert after.schedule == rcm_schedule(4, 200.0, "sde", boundary=0.875)
    moved = run(program, f"distill-steps{{{options} boundary=0.95}}", **places)
    assert moved.schedule == rcm_schedule(4, 200.0, "sde", boundary=0.95)
    for name, tensors in (("transformer", high), ("transformer_2", low)):
        write_sharded_folder(tmp_path / "both" / name, tensors)
    folder = run(program, ASSUMED, student=tmp_path / "both")
    assert folder.schedule == after.schedule
    assert_weights(folder, low, "transformer_2")
    with pytest.raises(BadInput, match="holds one network, the model has 2"):
        run(program, ASSUMED, student=places["high"])
    program.components.pipeline_config.pop("boundary_ratio")
    with pytest.raises(BadInput, match="two experts and no boundary_ratio; set `boundary`"):
        run(program, f"distill-steps{{{options}}}", **places)


def test_students_that_say_different_noise_levels_leave_it_to_the_recipe(tmp_path):
    program = program_of("t2v", experts=2)
    for name, sigma_max in (("transformer", 80), ("transformer_2", 120)):
        folder = write_sharded_folder(tmp_path / "both" / name, random_weights(program, 1))
        note = {"distillation": "rcm", "sigma_max": sigma_max}
        (folder / "distillation.json").write_text(json.dumps(note))
    with pytest.raises(BadInput, match=r"different sigma_max, \[80.0, 120.0\]; set `sigma_max`"):
        run(program, "distill-steps{weights=both}", both=tmp_path / "both")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if not n.startswith("proj_out")},
            "2 weights are missing: proj_out.bias, proj_out.weight; a student has all weights",
        ),
        (
            lambda t: t | {"blocks.2.norm2.weight": torch.ones(2)},
            "1 are not the model's: blocks.2.norm2.weight; .* as `turbo-opt calibrate rcm` makes",
        ),
        (
            lambda t: part_of(t, 3) | {"other": torch.ones(2)},
            "66 weights are missing: .* and 61 more; 1 are not the model's: other",
        ),
        (
            lambda t: t | {"proj_out.weight": torch.ones(64, 255), "proj_out.bias": torch.ones(1)},
            r"2 weights are of other shapes: proj_out.bias is \[1\] instead of \[64\], "
            r"proj_out.weight is \[64, 255\] instead of \[64, 256\]",
        ),
    ],
)
def test_what_is_missing_unknown_or_of_another_shape_is_named(
    program, student, tmp_path, change, message
):
    path = write_safetensors(tmp_path / "student.safetensors", change(student))
    with pytest.raises(BadInput, match=message):
        run(program, ASSUMED, student=path)


def test_a_checkpoint_of_a_training_is_refused_with_the_command_that_converts_it(program, tmp_path):
    place = tmp_path / "step-000003"
    place.mkdir()
    (place / ".metadata").touch()
    message = f"is a DCP checkpoint.*`turbo-opt calibrate convert {place} OUT.safetensors`"
    for pipeline in (ASSUMED, "merge-weights{target=student reference=student}"):
        with pytest.raises(BadInput, match=message):
            run(program, pipeline, student=place)


def test_options_are_checked_before_any_work():
    for text, message in (
        ("distill-steps", "required"),
        ("distill-steps{weights=s steps=5}", "must be less than or equal to 4"),
        ("distill-steps{weights=s rule=euler}", "'euler' is not allowed"),
        ("distill-steps{weights=s student=yes}", "'yes' is not allowed"),
        ("distill-steps{weights=s student=assume},distill-steps{weights=s}", "once 'distilled'"),
        ("canonicalize,quantize-linear,distill-steps{weights=s}", "once 'linear-quantized' holds"),
    ):
        with pytest.raises(BadInput, match=message):
            validate_pipeline(parse_pipeline(text))


def test_a_boundary_is_for_a_pair_of_experts(program, student, tmp_path):
    place = write_layout("diffusers", tmp_path / "student", student)
    with pytest.raises(BadInput, match="boundary is for a pair of experts, the model has one"):
        run(program, "distill-steps{weights=s student=assume boundary=0.5}", s=place)
    with pytest.raises(BadInput, match=r"sigma_max is 10.0; it must be above 14.1"):
        run(program, "distill-steps{weights=s student=assume sigma_max=10}", s=place)
