"""Everything of a pipeline but the denoisers: text encoder, tokenizer, VAE, from diffusers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from turbo_opt.errors import BadInput

if TYPE_CHECKING:
    from turbo_opt.artifact.load import LoadedArtifact
    from turbo_opt.artifact.manifest import ComponentsRecord


def components_folder(path: Path, recorded: ComponentsRecord, given: str | None) -> Path:
    """The diffusers folder of the artifact at `path`: the one given, else the recorded one.

    Raises:
        BadInput: it is not where it was, and cannot be had from the hub.
    """
    from turbo_opt.capture.folder import find_source

    if given is not None:
        return find_source(given)
    if recorded.found_at is not None and Path(recorded.found_at).is_dir():
        return find_source(recorded.found_at)
    try:
        return find_source(recorded.source)
    except BadInput as error:
        raise BadInput(
            f"{path}: text encoder and VAE come from {recorded.source!r}, which is not "
            f"here ({error}); name the diffusers folder: load(path, components=...)"
        ) from None


def load_components(artifact: LoadedArtifact) -> Any:
    """The diffusers pipeline of an artifact without denoisers, on the CPU; kept for the next call.

    The VAE computes in float32, the encoders in the artifact's dtype.

    Raises:
        BadInput: the folder is missing or diffusers cannot read it.
    """
    if artifact._pipeline is None:
        artifact._pipeline = _read(artifact)
    return artifact._pipeline


def as_pipeline(artifact: LoadedArtifact) -> Any:
    """The original diffusers pipeline, with the compiled denoisers and their scheduler in it.

    This is the way to generate with image-conditioned models (I2V, FLF2V, VACE):
    `turbo_opt.load(path, device="cuda").as_pipeline()(image=image, prompt=prompt, ...)`. A schedule
    without guidance wants `guidance_scale=1.0`.

    Raises:
        BadInput: the diffusers folder is missing or diffusers cannot read it.
    """
    pipeline = _read(artifact)
    for name, transformer in artifact.transformers.items():
        setattr(pipeline, name, transformer)
    pipeline.scheduler = artifact.scheduler
    return pipeline.to(artifact.device)


def _read(artifact: LoadedArtifact) -> Any:
    import diffusers

    name = artifact.manifest.components.pipeline_class
    cls = getattr(diffusers, name, None) if name.startswith("Wan") else None
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline):
        raise BadInput(f"{artifact.path}: diffusers has no Wan pipeline {name!r}")
    folder = components_folder(artifact.path, artifact.manifest.components, artifact.components)
    dtypes = {"default": artifact.dtype, "vae": torch.float32}
    absent = dict.fromkeys(artifact.transformers)
    try:
        with warnings.catch_warnings():
            # `torch_dtype` is what every diffusers knows; newer ones would rather read `dtype`.
            warnings.simplefilter("ignore", FutureWarning)
            return cls.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True, **absent)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: diffusers cannot read it as a {name} ({error})") from error
