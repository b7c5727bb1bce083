"""A set of samples, as `turbo-opt calibrate data` makes them, of clips drawn by formula.

The students of tiny-wan learn from these: drawing and encoding a clip costs a hundredth of having
the teacher sample it, and its caption is true of it. All clips lie in one tar file.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from turbo_opt.calibration.data.samples import (
    EMPTY_PROMPT,
    LATENTS,
    PROMPT_EMBEDS,
    SampleIndex,
    SampleRecord,
    used_positions,
    write_index,
    write_sample,
)
from turbo_opt.calibration.latents import normalise

from . import whole_clip
from .architecture import TEXT_LENGTH
from .clips import TEMPLATES, caption, render_table, sample_scenes, scene_table
from .training import autocast

SHARD = "clips.tar"
_CANONICAL_SHARE = 0.6
"""Share of captions in the canonical form; the others use a paraphrase."""


def draw_samples(pipeline: Any, count: int, seed: int, out: Path, batch: int = 128) -> SampleIndex:
    """Draw, encode and store `count` captioned clips of the training split.

    Args:
        pipeline: tiny-wan's WanPipeline, on the device that encodes.
        seed: of the scenes, and of which caption each has.
        out: the folder; made if it is not there.
    """
    scenes = sample_scenes(count, seed, split="train")
    choose = random.Random(f"captions/{seed}")
    captions = [caption(scene, _template(choose)) for scene in scenes]
    embeds = encode_captions(pipeline, ["", *dict.fromkeys(captions)])
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{number:06d}.safetensors" for number in range(count)]
    table = scene_table(scenes, pipeline.device)
    with tarfile.open(out / SHARD, "w") as archive, ThreadPoolExecutor() as threads:
        for start in range(0, count, batch):
            latents = _encode(pipeline.vae, table[start : start + batch])
            texts = [embeds[each] for each in captions[start : start + batch]]
            for name, content in zip(
                names[start : start + batch], threads.map(_packed, latents, texts), strict=True
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    write_sample(out / EMPTY_PROMPT, None, embeds[""])
    index = SampleIndex(
        format=1,
        latents=tuple(latents.shape[1:]),
        text_length=TEXT_LENGTH,
        text_dim=embeds[""].shape[-1],
        source={"drawn": "tiny-wan", "seed": seed},
        samples=tuple(
            SampleRecord(file=f"{SHARD}/{name}", caption=text)
            for name, text in zip(names, captions, strict=True)
        ),
    )
    write_index(out, index)
    return index


@torch.no_grad()
def encode_captions(pipeline: Any, captions: Sequence[str], batch: int = 512) -> dict[str, Tensor]:
    """Caption → embeddings (T, C_text) float32 on the CPU, without padding."""
    found: dict[str, Tensor] = {}
    for start in range(0, len(captions), batch):
        chunk = list(captions[start : start + batch])
        embeds, _ = pipeline.encode_prompt(
            prompt=chunk,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_LENGTH,
            device=pipeline.device,
        )
        found |= zip(chunk, (used_positions(each) for each in embeds.float().cpu()), strict=True)
    return found


@torch.no_grad()
def _encode(vae: Any, rows: Tensor) -> Tensor:
    """Latents as the denoiser sees them, float16 on the CPU."""
    with autocast(rows.device, rows.is_cuda):
        mean, _ = whole_clip.encode(vae, render_table(rows))
    return normalise(vae, mean.float()).half().cpu()


def _packed(latents: Tensor, prompt_embeds: Tensor) -> bytes:
    """A sample file's content."""
    tensors = {LATENTS: latents, PROMPT_EMBEDS: prompt_embeds.to(torch.bfloat16)}
    return save({name: value.contiguous() for name, value in tensors.items()})


def _template(choose: random.Random) -> int:
    canonical = choose.random() < _CANONICAL_SHARE
    return 0 if canonical else choose.randrange(1, len(TEMPLATES))
