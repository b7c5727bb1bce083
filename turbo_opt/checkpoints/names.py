"""Names of Wan's weights: those of the original code and of diffusers, and prefixes around them.

    blocks.0.self_attn.q.weight  ↔  blocks.0.attn1.to_q.weight
    net.head.head.bias           →  proj_out.bias

The table is exact and goes both ways. Diffusers' own conversion of single files serves as the
check of it in the tests; it goes one way only, knows neither FLF2V's `img_emb.emb_pos` nor the
projections of sparse-linear attention, and replaces parts of names that it should leave alone.
"""

from __future__ import annotations

import re

_TOP = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
}  # fmt: skip
_IMAGE_ATTENTION = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{
        f"cross_attn.{ours}": f"attn2.{theirs}"
        for ours, theirs in (_ATTENTION | _IMAGE_ATTENTION).items()
    },
    # Released for SLA; those of SLA2, of which nothing is, stand beside it.
    **{
        f"self_attn.attn_op.local_attn.{module}": f"attn1.{module}"
        for module in ("proj_l", "router.proj_q", "router.proj_k", "alpha")
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}
_TOP_BACK = {diffusers: original for original, diffusers in _TOP.items()}
_BLOCK_BACK = {diffusers: original for original, diffusers in _BLOCK.items()}

_IN_BLOCK = re.compile(r"((?:vace_)?blocks\.\d+\.)(.+)", re.DOTALL)
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "model.",
    "net.",
    "transformer.",
    "transformer_2.",
)
_BARE = frozenset(
    {
        "modulation",
        "head.modulation",
        "img_emb.emb_pos",
        "scale_shift_table",
        "condition_embedder.image_embedder.pos_embed",
    }
)
"""Parameters that are no module's `weight` or `bias`."""
_TRAINING_COUNTERS = frozenset(
    {
        "accum_video_sample_counter",
        "accum_image_sample_counter",
        "accum_iteration",
        "accum_train_in_hours",
    }
)
_KEPT_ASIDE = re.compile(r"\.((proj_l|alpha)\.(weight|bias)|router\.proj_[qk]\.weight)$")


def without_prefix(name: str) -> str:
    """`name` without what training code, ComfyUI, PEFT or diffusers put before a network's own."""
    while name.startswith(_PREFIXES):
        name = name.removeprefix(next(prefix for prefix in _PREFIXES if name.startswith(prefix)))
    return name


def is_training_counter(name: str) -> bool:
    """Whether `name`, without prefix, counts steps or samples, as buffers of networks that NVIDIA's
    framework for Cosmos trained do: nothing that a network computes with."""
    return name in _TRAINING_COUNTERS


def diffusers_name(name: str) -> str:
    """The name that diffusers has for a weight of the original Wan; any other name as it is."""
    return _renamed(name, _TOP, _BLOCK) or name


def original_name(name: str) -> str | None:
    """The name that the original Wan has for a weight of diffusers; None where it has none."""
    return _renamed(name, _TOP_BACK, _BLOCK_BACK)


def is_weight(name: str) -> bool:
    """Whether `name`, without prefix, is a weight's of some Wan: the original's, or diffusers'."""
    inside = _IN_BLOCK.fullmatch(name)
    rest = inside[2] if inside else name
    tables = (_BLOCK, _BLOCK_BACK) if inside else (_TOP, _TOP_BACK)
    if rest in _BARE:
        return any(rest in table for table in tables)
    module, _, leaf = rest.rpartition(".")
    named = leaf in ("weight", "bias") and module not in _BARE
    return named and any(module in table for table in tables)


def is_in_block(name: str) -> bool:
    """Whether `name`, without prefix, is inside a transformer block."""
    return _IN_BLOCK.fullmatch(name) is not None


def is_kept_aside(name: str) -> bool:
    """Whether `name` is a weight that no diffusers class has, but that a pass may want."""
    return _KEPT_ASIDE.search(name) is not None


def _renamed(name: str, top: dict[str, str], block: dict[str, str]) -> str | None:
    inside = _IN_BLOCK.fullmatch(name)
    stem, rest = inside.groups() if inside else ("", name)
    table = block if inside else top
    if rest in table:
        return f"{stem}{table[rest]}"
    module, dot, leaf = rest.rpartition(".")
    return f"{stem}{table[module]}.{leaf}" if dot and module in table else None
