"""Put the trained parts together as one diffusers folder, ready to ship.

The denoiser and the text encoder are stored in bf16, the VAE in float16, whose finer rounding
its decoder's flat colours deserve. The tokenizer is recorded under a class name that transformers
4 and 5 both know.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from .architecture import build_scheduler, build_tokenizer, file_mebibytes

MAX_FILE_MEBIBYTES = 16.0
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def assemble(work: Path, out: Path) -> dict[str, float]:
    """Write ``out`` from the trainings' ``work`` folder; returns the sizes of its weights in MiB.

    Raises ValueError if a file is too large to ship.
    """
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder").to(torch.bfloat16),
        vae=AutoencoderKLWan.from_pretrained(work / "vae").to(torch.float16),
        scheduler=build_scheduler(),
        transformer=WanTransformer3DModel.from_pretrained(work / "transformer").to(torch.bfloat16),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    _edit_json(out / "model_index.json", tokenizer=["transformers", _TOKENIZER_CLASS])
    _edit_json(out / "tokenizer" / "tokenizer_config.json", tokenizer_class=_TOKENIZER_CLASS)
    for config in out.glob("*/config.json"):
        _forget_origin(config)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors files are born private

    sizes = {
        str(path.relative_to(out)): round(file_mebibytes(path), 2)
        for path in sorted(out.rglob("*.safetensors"))
    }
    too_large = {name: size for name, size in sizes.items() if size > MAX_FILE_MEBIBYTES}
    if too_large:
        raise ValueError(f"files over {MAX_FILE_MEBIBYTES} MiB cannot ship: {too_large}")
    return sizes


def _edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content, indent=2) + "\n")


def _forget_origin(path: Path) -> None:
    """Drop the training folder's name, which diffusers and transformers record."""
    content = json.loads(path.read_text())
    content.pop("_name_or_path", None)
    path.write_text(json.dumps(content, indent=2) + "\n")
