"""A diffusers pipeline folder: where it is, what it holds, and whether we can compile it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbo_opt.embedded import embedded
from turbo_opt.errors import BadInput
from turbo_opt.ir.program import Components
from turbo_opt.json_files import read_json

DENOISER_CLASSES = ("WanTransformer3DModel", "WanVACETransformer3DModel")
"""Diffusers classes that capture knows the inputs of."""
_DENOISER_NAMES = ("transformer", "transformer_2")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class PipelineFolder:
    """A checked diffusers folder.

    Attributes:
        path: the folder on disk.
        components: class names and settings from `model_index.json`.
        denoisers: name → (class name, config) of every network to compile.
    """

    path: Path
    components: Components
    denoisers: Mapping[str, tuple[str, Mapping[str, Any]]]


def open_pipeline(source: str, base: Path | None = None) -> PipelineFolder:
    """Find and check the pipeline that `source` names. Reads JSON only, no weights.

    Args:
        source: `tiny-wan`, a diffusers folder, or a hub id such as
            `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`.
        base: where a relative path starts, see `find_source`.

    Raises:
        BadInput: nothing is there, or it is no Wan pipeline of diffusers.
    """
    path = find_source(source, base)
    index = read_json(path / "model_index.json")
    entries = {k: v for k, v in index.items() if not k.startswith("_")}
    folders = {
        key: (str(value[0]), str(value[1]))
        for key, value in entries.items()
        if isinstance(value, list) and len(value) == 2 and all(value)
    }
    settings = {key: value for key, value in entries.items() if not isinstance(value, list)}
    pipeline_class = str(index.get("_class_name", ""))
    denoisers = {}
    for name in _DENOISER_NAMES:
        if name in folders:
            denoisers[name] = _denoiser(path, name, folders[name][1])
    if not denoisers or not pipeline_class.startswith("Wan"):
        raise BadInput(
            f"{source}: not a Wan pipeline (model_index.json says {pipeline_class or 'nothing'!r} "
            f"with {', '.join(sorted(folders)) or 'no components'}); expected a diffusers folder "
            "of a WanPipeline with a transformer/"
        )
    components = Components(source, pipeline_class, folders, settings)
    return PipelineFolder(path, components, denoisers)


def find_source(source: str, base: Path | None = None) -> Path:
    """The folder that `source` stands for.

    Args:
        base: where a relative path starts, such as the folder of the file that says it; the
            current folder comes after it, and alone without it.

    Raises:
        BadInput: it is neither embedded, nor a folder, nor a hub id that can be had.
    """
    inside = embedded(source)
    if inside is not None and inside.is_dir():
        return inside
    given = Path(source).expanduser()
    for path in [given] if base is None else [base / given, given]:
        if (path / "model_index.json").is_file():
            return path.resolve()
        if path.exists():
            raise BadInput(f"{source}: no model_index.json in it, so it is no diffusers pipeline")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _from_hub(source)
    raise BadInput(
        f"{source}: no such folder; a model is 'tiny-wan', a diffusers folder or a hub id"
    )


def _denoiser(path: Path, name: str, class_name: str) -> tuple[str, Mapping[str, Any]]:
    if class_name not in DENOISER_CLASSES:
        raise BadInput(
            f"{path / name}: cannot compile a {class_name}; known: {', '.join(DENOISER_CLASSES)}"
        )
    return class_name, read_json(path / name / "config.json")


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES, local_files_only=True))
    except Exception as error:
        if offline:
            raise BadInput(
                f"{source}: not in the local hub cache, and HF_HUB_OFFLINE is set"
            ) from error
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise BadInput(
            f"{source}: no such folder, and the hub could not give it ({type(error).__name__})"
        ) from error
