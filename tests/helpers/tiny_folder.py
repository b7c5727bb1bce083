"""Small random Wan pipelines as complete diffusers folders, for tests that need no skill of it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from turbo_opt.artifact.save import save
from turbo_opt.capture import capture
from turbo_opt.ir.program import Program

VOCABULARY = ("<pad>", "</s>", "<unk>", "a", "red", "blue", "green", "circle", "square", "moves")
TINY_RECIPE = {
    "model": {"source": "tiny"},
    "generate": {"height": 32, "width": 48, "num_frames": 5, "fps": 8.0, "flow_shift": 3.0},
}
SHARD_BYTES = 2**20


def tiny_transformer_config(**overrides: Any) -> dict[str, Any]:
    """Arguments of a WanTransformer3DModel with 2 heads of 128 and 2 layers."""
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 256,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }
    return config | overrides


def write_tiny_folder(
    path: Path,
    *,
    experts: int = 1,
    seed: int = 0,
    transformer: dict[str, Any] | None = None,
    **pipeline_config: Any,
) -> Path:
    """Write a whole WanPipeline with random weights (about 5 MB an expert) to `path`.

    Args:
        experts: 2 adds `transformer_2` with other weights, and a boundary ratio of 0.7.
        seed: of all weights.
        transformer: overrides of `tiny_transformer_config`.
        pipeline_config: further settings of the pipeline, such as `expand_timesteps`.
    """
    import diffusers

    library: Any = diffusers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_transformer_config(**(transformer or {}))
        networks = [library.WanTransformer3DModel(**config).eval() for _ in range(experts)]
        if experts == 2:
            pipeline_config.setdefault("boundary_ratio", 0.7)
        pipeline = library.WanPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_text_encoder(config["text_dim"]),
            vae=_autoencoder(config["in_channels"]),
            scheduler=library.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            transformer=networks[0],
            transformer_2=networks[1] if experts == 2 else None,
            **pipeline_config,
        )
    pipeline.save_pretrained(path)
    return path


@functools.cache
def _scratch() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny-wan-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def shared_folder(experts: int = 1) -> Path:
    """A folder of one-layer networks, written once for all tests of a process."""
    return _folder(experts)


def shared_artifact(experts: int = 1) -> Path:
    """An artifact of `tiny_program`, in several shards. Not to be changed."""
    return _artifact(experts)


@functools.cache
def _folder(experts: int) -> Path:
    path = _scratch() / f"folder-{experts}"
    return write_tiny_folder(path, experts=experts, transformer={"num_layers": 1})


@functools.cache
def _captured(experts: int, dtype: str) -> Program:
    return capture(str(shared_folder(experts)), dtype=dtype, num_inference_steps=3)


def tiny_program(experts: int = 1, dtype: str = "float32") -> Program:
    """The captured program of `shared_folder`, three guided steps; a copy to rewrite at will."""
    return _captured(experts, dtype).fork()


@functools.cache
def _artifact(experts: int) -> Path:
    return save(
        tiny_program(experts),
        _scratch() / f"artifact-{experts}",
        recipe=TINY_RECIPE,
        target="cpu",
        max_shard_bytes=SHARD_BYTES,
    )


def reference_pipeline(folder: Path) -> Any:
    """Diffusers' own pipeline over a folder, to compare with bit for bit.

    Its weights are copied out of the memory map: MKL's small products round differently on
    memory that is not aligned to 64 bytes.
    """
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    for part in (pipeline.transformer, pipeline.transformer_2, pipeline.text_encoder, pipeline.vae):
        for parameter in part.parameters() if part is not None else ():
            parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder(channels: int) -> Any:
    import diffusers

    library: Any = diffusers
    return library.AutoencoderKLWan(
        base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def _text_encoder(width: int) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(VOCABULARY),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).eval()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
