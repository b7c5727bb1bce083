"""Sampling with networks in stages gives every bit of sampling with whole ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.tiny_folder import tiny_program
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.runtime.module import CompiledTransformer
from turbo_opt.runtime.sampler import initial_latents, sample

QUANTIZED = "canonicalize,fuse-norms,quantize-linear,fuse-norm-quantize"


def experts(pipeline):
    """Both networks of the optimized program, and the schedule."""
    planned = validate_pipeline(parse_pipeline(pipeline))
    program = PassManager(planned, verification=Verification("off")).run(tiny_program(2))
    built = {}
    for name, denoiser in program.denoisers.items():
        weights = {key: tensor.load() for key, tensor in denoiser.weights.items()}
        built[name] = CompiledTransformer.build(
            denoiser.exported, weights, denoiser.config, "cpu", denoiser.stages
        )
    return built, program.schedule


def with_guidance(schedule, scales):
    """The schedule with that guidance scale, or none, at each step."""
    steps = zip(schedule.steps, scales, strict=True)
    return replace(
        schedule, steps=tuple(replace(step, guidance_scale=scale) for step, scale in steps)
    )


def latents_of_clips(transformers, schedule):
    """Clips in turn by the same networks: of two prompts and sizes, and a step without guidance."""
    generator = torch.Generator().manual_seed(0)
    one, other, negative = torch.randn(3, 1, 512, 32, generator=generator)
    unguided = with_guidance(schedule, (None, 2.0, None))
    for prompt, steps, size in (
        (one, schedule, (2, 8, 12)),
        (other, schedule, (1, 8, 8)),
        (one, unguided, (2, 8, 12)),
    ):
        noise = initial_latents(steps, (1, 16, *size), generator)
        yield sample(transformers, steps, prompt, negative, latents=noise, generator=generator)


@pytest.mark.parametrize("pipeline", ["canonicalize", QUANTIZED], ids=["canonical", "quantized"])
def test_two_experts_in_stages_keep_every_bit_of_guided_sampling(pipeline):
    whole, schedule = experts(pipeline)
    staged, _ = experts(f"{pipeline},hoist-invariants")
    schedule = with_guidance(schedule, (5.0, 5.0, 3.0))
    assert {step.denoiser for step in schedule.steps} == set(staged)
    assert len(staged) == 2
    expected = list(latents_of_clips(whole, schedule))
    found = list(latents_of_clips(staged, schedule))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({clip.sum().item() for clip in expected}) == len(expected)
    assert all(network._staged is not None for network in staged.values())
    assert all(network._staged is None for network in whole.values())
