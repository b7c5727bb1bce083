"""The benchmark of cold starts: what a model of random weights gets besides its denoiser."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch

from benchmarks import cold_start
from benchmarks.components import SMALL, write_components

CHANNELS = 64


def test_components_are_read_encode_a_prompt_and_decode_a_clip(tmp_path: Path) -> None:
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    write_components(tmp_path, CHANNELS, SMALL, torch.device("cpu"))
    pipeline = diffusers.WanPipeline.from_pretrained(tmp_path, transformer=None, scheduler=None)
    embeds, _ = pipeline.encode_prompt(
        cold_start._PROMPT, do_classifier_free_guidance=False, max_sequence_length=512
    )
    assert embeds.shape == (1, 512, CHANNELS) and embeds.isfinite().all()
    assert 120 < int(embeds.abs().sum(-1).count_nonzero()) < 200  # as long as the forwards' prompt
    with torch.no_grad():
        frames = pipeline.vae.decode(torch.randn(1, 16, 2, 4, 4)).sample
    assert frames.shape == (1, 3, 5, 32, 32) and frames.isfinite().all()


def test_a_record_has_the_medians_of_its_parts() -> None:
    runs = [
        {**dict.fromkeys(cold_start.PARTS, seconds), "total_s": 6 * seconds}
        for seconds in (3.0, 1.0, 2.0)
    ]
    record = cold_start._record(cold_start.Session(dry=True), "tiny", "warm", runs)
    assert record.name.endswith("/first_clip_warm_caches_s")
    assert (record.value, record.spread, record.runs) == (12.0, 6.0, 3)
    assert {part: record.config[part] for part in cold_start.PARTS} == dict.fromkeys(
        cold_start.PARTS, 2.0
    )
