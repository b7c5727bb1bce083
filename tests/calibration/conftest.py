"""A small random teacher whose self-attention matters, and a set of samples for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_folder import write_tiny_folder
from turbo_opt.calibration.data.samples import (
    EMPTY_PROMPT,
    SampleIndex,
    SampleRecord,
    write_index,
    write_sample,
)

LATENTS = (16, 2, 16, 16)  # 128 tokens, two key blocks of 64
TEXT_LENGTH, TEXT_DIM = 16, 32

JOB = """\
schema_version: 1
job: sla
teacher: {source: ./teacher}
data: {folder: samples, held_out: 2}
sla: {topk: 0.5, block_q: 64, block_k: 64}
training: {steps: 4, batch: 2, rate: 3.0e-4, compute_dtype: float32}
save: {every: 3}
log: {every: 1, evaluate_every: 2}
"""

ROUTER_JOB = """\
schema_version: 1
job: router
teacher: {source: ./teacher}
data: {folder: samples, held_out: 2}
router: {topk: 0.5, block_q: 64, block_k: 64}
training: {steps: 6, batch: 2, rate: 0.02, compute_dtype: float32}
save: {every: 3, asynchronous: false}
log: {every: 1, evaluate_every: 6}
export: {dtype: float32}
"""


def write_samples(
    folder: Path, count: int = 8, frames: int = LATENTS[1], text_dim: int = TEXT_DIM
) -> Path:
    """Random smooth latents and random prompts."""
    folder.mkdir()
    channels, _, *sides = LATENTS
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 16, 2, 4, 4, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, (frames, *sides), mode="trilinear")
    prompts = torch.randn(count + 1, 5, text_dim, generator=generator)
    for number in range(count):
        write_sample(folder / f"{number:06d}.safetensors", latents[number], prompts[number])
    write_sample(folder / EMPTY_PROMPT, None, prompts[count])
    records = tuple(SampleRecord(file=f"{n:06d}.safetensors") for n in range(count))
    index = SampleIndex(
        format=1,
        latents=(channels, frames, *sides),
        text_length=TEXT_LENGTH,
        text_dim=text_dim,
        samples=records,
    )
    write_index(folder, index)
    return folder


def write_teacher(folder: Path, seed: int = 0) -> Path:
    """A random two-layer Wan in which attention is sharp and passes through open gates."""
    write_tiny_folder(folder, seed=seed)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name, value in weights.items():
        if name.endswith(("attn1.norm_q.weight", "attn1.norm_k.weight")):
            value *= 1.5
        elif name.startswith("blocks.") and name.endswith("scale_shift_table"):
            value[:, 2] = 2.0
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the teacher, the samples and job.yaml lie. Not to be changed."""
    folder = tmp_path_factory.mktemp("calibration")
    write_teacher(folder / "teacher")
    write_samples(folder / "samples")
    (folder / "job.yaml").write_text(JOB)
    return folder


@pytest.fixture
def samples_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a set of samples that a test may spoil."""
    return lambda count=8: write_samples(tmp_path / "samples", count)
