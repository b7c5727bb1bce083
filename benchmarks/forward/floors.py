"""The least time that a forward could take on this GPU: what it must multiply and move.

    layers · (linear / rate + attention / rate + branch / rate + cross-attention / rate
              + bytes / copy)

Counted are the blocks of the transformer. What follows a product of matrices (bias, GELU, gate,
residual, quantization) can be part of it, and what a product reads and writes is hidden behind it;
bytes are those of the passes that no product can hide: norms, which need a whole row, and what
makes the operands of attention. Not counted, as a thousandth of it all: embeddings, the last
projection, modulation, scales, and the choice of blocks.

Rates are the library's, measured in the same run: its products of 8192³ for linear layers, for the
blocks that sparse attention keeps, for attention in 8 bits, and for the linear branch; its dense
attention for attention to all keys in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.forward.cases import HEAD_DIM, Case
from benchmarks.kernels._harness import Session, dense_attention
from benchmarks.kernels._sparse import eight_bit_matmul
from benchmarks.results import Ceiling
from turbo_opt.compiler.pipeline import parse_pipeline, validate_options
from turbo_opt.kernels.sparse_rules import kept_blocks

PROMPT_POSITIONS = 512


@dataclass(frozen=True)
class Computation:
    """What a pipeline makes of a denoiser, as far as its floor depends on it.

    Attributes:
        scheme: of the operands of linear layers: "bf16", "int8-block" or "fp8-block".
        attention: "dense", "sage" in 8 bits to all keys, "sage-16bit" with P and v in 16 bits,
            "sla", or "sagesla".
        topk: share of the key blocks that sparse attention keeps.
        block_k: tokens of a key block.
        padding_once: cross-attention computes one key for all of the padding.
        prompt_once: keys and values of the prompt are not computed in a step.
    """

    scheme: str = "bf16"
    attention: str = "dense"
    topk: float = 1.0
    block_k: int = 128
    padding_once: bool = False
    prompt_once: bool = False

    @classmethod
    def of(cls, pipeline: str) -> Computation:
        """That of a graph after `pipeline`, in text form; of diffusers' own for the empty one."""
        passes = {spec.name: validate_options(spec) for spec in parse_pipeline(pipeline)}
        facts: dict[str, Any] = {
            "padding_once": "merge-padding" in passes,
            "prompt_once": "hoist-invariants" in passes,
        }
        if linear := passes.get("quantize-linear"):
            facts["scheme"] = linear.scheme  # type: ignore[attr-defined]
        if "sage-attention" in passes:
            facts["attention"] = "sage"
        if sparse := passes.get("sparse-attention"):
            facts["attention"] = sparse.mode  # type: ignore[attr-defined]
            facts["topk"], facts["block_k"] = sparse.topk, sparse.block_k  # type: ignore[attr-defined]
        return cls(**facts)


@dataclass(frozen=True)
class Work:
    """Of one transformer block. A multiplication and its addition are two operations.

    Attributes:
        linear: operations of the linear layers.
        attention: of self-attention, to all keys or to those kept.
        branch: of the linear branch of sparse-linear attention.
        cross_attention: of attention to the prompt.
        moved: bytes read and written by passes that no product can hide.
    """

    linear: int
    attention: int
    branch: int
    cross_attention: int
    moved: int

    @classmethod
    def of(cls, case: Case, computation: Computation) -> Work:
        """Of one of the transformer blocks of a case."""
        tokens, dim = case.tokens, case.channels
        # q, k, v and o of self-attention, q and o of cross-attention, and the feed-forward layers.
        linear = 2 * tokens * (6 * dim**2 + 2 * dim * case.config["ffn_dim"])
        if not computation.prompt_once:
            linear += 2 * PROMPT_POSITIONS * 2 * dim**2
        sparse = computation.attention in ("sla", "sagesla")
        kept = kept_blocks(computation.topk, tokens, computation.block_k) * computation.block_k
        prompt = PROMPT_POSITIONS
        if computation.padding_once:
            prompt = min(prompt, case.prompt_tokens + 1)
        return cls(
            linear,
            4 * tokens * (kept if sparse else tokens) * dim,
            # φ(k)ᵀv and φ(q)·state; proj_l can be multiplied into the state.
            4 * tokens * HEAD_DIM * dim if sparse else 0,
            4 * tokens * prompt * dim,
            _moved_bytes_per_value(computation) * tokens * dim,
        )


def _moved_bytes_per_value(computation: Computation) -> int:
    """Bytes of unhidden passes for each token and channel; the residual stream has 16 bits."""
    operand = 2 if computation.scheme == "bf16" else 1
    norms = 3 * (2 + operand)
    cross_query = 2 + 2
    own = {
        "dense": 2 * (2 + 2),  # q and k, normalized and turned
        # Normalized and turned, then k's mean and v's maxima, then the three in 8 bits.
        "sage": 2 * (2 + 2) + 2 * 2 + 3 * (2 + 1),
        "sage-16bit": 2 * (2 + 2) + 2 + 2 * (2 + 1),  # v as it is
        "sla": 2 * (2 + 2) + 2,  # and v read for the state, in k's pass
        # 8-bit q in one pass; k's mean and v's maxima are known after a pass of their own.
        "sagesla": (2 + 1) + 2 * (2 + 2 + 1),
    }
    return norms + cross_query + own[computation.attention]


@dataclass(frozen=True)
class Rates:
    """What the device did in this run: operations in TFLOP/s or TOPS, copies in GB/s.

    Attributes:
        products: by scheme.
        kept_blocks: of self-attention in 8 bits, or to some blocks, by kind.
        attention: to all keys, in 16 bits.
        copy: bytes read and written.
    """

    products: Mapping[str, Ceiling]
    kept_blocks: Mapping[str, Ceiling]
    attention: Ceiling
    copy: Ceiling


def measured_rates(case: Case, session: Session) -> Rates:
    """Those of this run; dense attention is that of the case's clip."""
    shape = (1, case.heads, case.tokens, HEAD_DIM)
    query = torch.randn(shape, device=session.device, dtype=torch.bfloat16)
    timing = session.time(lambda: dense_attention(query, query, query), [()])
    operations = 4 * case.tokens**2 * case.channels
    eight_bits = eight_bit_matmul(session)
    return Rates(
        {"bf16": session.bf16_matmul, **session.library_matmul},
        {
            "sla": session.bf16_matmul,
            "sage": eight_bits,
            "sage-16bit": eight_bit_matmul(session, "16bit"),
            "sagesla": eight_bits,
        },
        Ceiling(operations / timing.ms / 1e9, "TFLOP/s", "the library's dense attention"),
        session.copy,
    )


def floor(case: Case, computation: Computation, rates: Rates, forwards: int = 1) -> Ceiling:
    """The least milliseconds of so many forwards, and at which rates."""
    work, products = Work.of(case, computation), rates.products
    dense = computation.attention == "dense"
    attention = rates.attention if dense else rates.kept_blocks[computation.attention]
    milliseconds = (
        work.linear / products[computation.scheme].value
        + work.attention / attention.value
        + work.branch / products["bf16"].value
        + work.cross_attention / rates.attention.value
    ) / 1e9 + work.moved / rates.copy.value / 1e6
    what = (
        f"{f'{forwards} forwards: ' if forwards > 1 else ''}"
        f"linear at {products[computation.scheme].what}, "
        f"{'kept blocks' if computation.topk < 1 else 'self-attention'} at {attention.what}, "
        f"{work.moved / 1e9:.2g} GB a block at {rates.copy.what}"
    )
    return Ceiling(forwards * case.config["num_layers"] * milliseconds, "ms", what)
