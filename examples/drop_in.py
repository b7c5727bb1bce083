"""Compile tiny-wan and put it into a diffusers pipeline in place of its transformer.

python examples/drop_in.py
"""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch
from diffusers import WanPipeline

import turbo_opt

artifact = Path("tiny-wan-fast")
subprocess.run(
    [sys.executable, "-m", "turbo_opt", "run", "tiny-wan/cpu", "--out", artifact, "--overwrite"],
    check=True,
)
with resources.as_file(resources.files("turbo_opt") / "models" / "tiny_wan") as folder:
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipe.transformer = turbo_opt.load(artifact)
frames = pipe(
    "a red circle moves left to right on a blue background",
    height=96,
    width=96,
    num_frames=17,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
print(f"{len(frames)} frames of {frames[0].shape}")
