"""Cross-attention over 512 text positions at the price of a few.

WanPipeline pads every prompt's embedding with zeros to 512 positions and the denoiser attends to
all of them, so the padding takes part in the softmax. But its positions are all alike:

    n equal keys k with logits s  =  one key k with logit s + log n

Training therefore passes CAPTION_LENGTH positions, biases the first padded one by the logarithm of
their number, and hides the other padded ones. The result is the same to rounding.
"""

from __future__ import annotations

from typing import Self

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor

from .architecture import TEXT_LENGTH


def padding_bias(mask: Tensor, text_length: int = TEXT_LENGTH) -> Tensor:
    """Bias (B, 1, 1, T) of attention logits, of a token mask (B, T) with at least one 0 per row."""
    valid = mask.bool()
    count = valid.sum(dim=1, keepdim=True)
    first_padded = torch.arange(mask.shape[1], device=mask.device)[None, :] == count
    bias = torch.full(mask.shape, float("-inf"), device=mask.device)
    bias = torch.where(first_padded, (text_length - count).float().log(), bias)
    return torch.where(valid, 0.0, bias)[:, None, None, :]


class CompactText:
    """Makes a denoiser read compact text; call :meth:`set` with the mask before each forward.

    ``with CompactText(transformer) as text:`` restores the ordinary attention at the end.
    """

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        self._attentions: list[WanAttention] = [block.attn2 for block in transformer.blocks]
        self._processor = _BiasedAttention()
        self._before = [attention.processor for attention in self._attentions]

    def __enter__(self) -> Self:
        for attention in self._attentions:
            attention.set_processor(self._processor)
        return self

    def __exit__(self, *error: object) -> None:
        for attention, processor in zip(self._attentions, self._before, strict=True):
            attention.set_processor(processor)

    def set(self, mask: Tensor) -> None:
        """Token mask (B, T) of the text that the next forward gets."""
        self._processor.bias = padding_bias(mask)


class _BiasedAttention(WanAttnProcessor):
    """WanAttnProcessor for cross-attention, with a bias on the logits, kept in float32."""

    bias: Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert self.bias is not None, "CompactText.set must be called before the forward"
        assert encoder_hidden_states is not None
        query_BLHD = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key_BTHD = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))
        value_BTHD = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        logits = torch.einsum(
            "blhd,bthd->bhlt", query_BLHD * query_BLHD.shape[-1] ** -0.5, key_BTHD
        )
        weights = (logits.float() + self.bias).softmax(dim=-1).to(value_BTHD.dtype)
        mixed = torch.einsum("bhlt,bthd->blhd", weights, value_BTHD).flatten(2)
        return attn.to_out[0](mixed)
