"""What the guide's artifact draws, beside its student and its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import turbo_opt
from benchmarks.students.held_out import HeldOutClips, schedule_of
from benchmarks.students.variants import STUDENT, TEACHER, Variant
from turbo_opt.calibration.flow import Sampled
from turbo_opt.calibration.networks import DenoiserFolder, build_network, open_denoiser
from turbo_opt.calibration.training.world import World
from turbo_opt.ir.schedule import Schedule

ARTIFACT = "artifact"
Model = tuple[str, Mapping[str, Any], Schedule, bool]
"""Name, networks, steps, and whether they are guided."""


def shares_right(
    artifact: Path, student: Path, device: torch.device, captions: int, batch: int, steps: int
) -> dict[str, dict[str, float]]:
    """Of `artifact`, `student` and `teacher`: which share of the clips shows each attribute.

    Args:
        artifact: what the guide compiles.
        student: the model folder that it is made of.
        captions: held-out ones, a clip each.
        batch: clips that are drawn at once.
        steps: of the teacher's sampler, each guided.
    """
    teacher = open_denoiser("tiny-wan", "transformer")
    clips = HeldOutClips(teacher, device, captions, batch)
    found = {}
    for name, networks, schedule, guided in _models(artifact, student, teacher, device, steps):
        found[name] = clips.shares_right(clips.draw(networks, schedule, guided=guided))
        print(f"{name}: {found[name]}", flush=True)
    return found


def _models(
    artifact: Path, student: Path, teacher: DenoiserFolder, device: torch.device, steps: int
) -> Iterator[Model]:
    # Prompts of a batch would be recorded into a graph for that batch alone.
    compiled = turbo_opt.load(artifact, device, cuda_graph=False)
    yield ARTIFACT, compiled.transformers, compiled.schedule, False
    few, many = Variant(STUDENT, len(compiled.schedule.steps)), Variant(TEACHER, steps, guided=True)
    distilled = open_denoiser(str(student), teacher.name)
    for variant, folder in ((few, distilled), (many, teacher)):
        network = build_network(folder, World(0, 1, device))
        sampled = Sampled(network, folder.config, torch.bfloat16)
        schedule = schedule_of(variant, teacher)
        yield variant.weights, {teacher.name: sampled}, schedule, variant.guided
