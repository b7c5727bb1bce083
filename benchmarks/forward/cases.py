"""The models that are measured, and the clip that each draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

PROMPT_TOKENS = 160
"""Unless another number is asked for: an extended prompt of some 120 words."""
HEAD_DIM = 128


@dataclass(frozen=True)
class Case:
    """A model, a clip and its prompt: the diffusers config, the latent's (frames, height, width),
    the prompt's tokens of 512 positions."""

    name: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    runs: int
    prompt_tokens: int = PROMPT_TOKENS

    def with_prompt(self, tokens: int) -> Case:
        """The same with another length of the prompt, which its name says."""
        return replace(self, name=f"{self.name}-prompt-{tokens}", prompt_tokens=tokens)

    @property
    def tokens(self) -> int:
        """How many tokens the clip has: patches are 1×2×2."""
        frames, height, width = self.latent
        return frames * height * width // 4

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def channels(self) -> int:
        return self.heads * HEAD_DIM


_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": HEAD_DIM,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
CASES = {
    "1.3b": Case(
        "wan2.1-t2v-1.3b-480p",
        {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        (21, 60, 104),
        runs=10,
    ),
    "14b": Case(
        "wan2.1-t2v-14b-720p",
        {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
        (21, 90, 160),
        runs=3,
    ),
    "tiny": Case(
        "tiny-random",
        {**_WAN, "num_attention_heads": 2, "num_layers": 2, "ffn_dim": 256, "text_dim": 64},
        (3, 8, 8),
        runs=2,
    ),
}
