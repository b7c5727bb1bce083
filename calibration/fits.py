"""Whether samples, a teacher and the processes fit each other, asked before any weight is read."""

from __future__ import annotations

import math

from turbo_opt.calibration.data.samples import SampleSet
from turbo_opt.calibration.networks import DenoiserFolder
from turbo_opt.calibration.training.world import World
from turbo_opt.errors import BadInput


def check_fits(samples: SampleSet, teacher: DenoiserFolder) -> None:
    """Raise BadInput unless the samples are of the teacher's kind and divide into its patches."""
    config, index = teacher.config, samples.index
    wanted = {"latent channels": config["in_channels"], "text channels": config["text_dim"]}
    found = {"latent channels": index.latents[0], "text channels": index.text_dim}
    for what, count in wanted.items():
        if found[what] != count:
            raise BadInput(
                f"{samples.path}: samples have {found[what]} {what}, {teacher.path} takes {count}; "
                "they are of another model"
            )
    for side, patch in zip(index.latents[1:], config["patch_size"], strict=True):
        if side % patch:
            raise BadInput(
                f"{samples.path}: latents of {index.latents} do not divide into patches of "
                f"{tuple(config['patch_size'])}"
            )


def check_shares(samples: SampleSet, teacher: DenoiserFolder, world: World) -> None:
    """Raise BadInput unless those that share a clip can share its tokens and heads evenly."""
    patches = zip(samples.index.latents[1:], teacher.config["patch_size"], strict=True)
    counts = {
        "heads": int(teacher.config["num_attention_heads"]),
        "tokens": math.prod(side // patch for side, patch in patches),
    }
    for what, count in counts.items():
        if count % world.context_size:
            raise BadInput(
                f"training.context_parallel: {world.context_size} processes cannot share {count} "
                f"{what} evenly"
            )
