"""Replace self-attention by sparse-linear attention (SLA), in 16 or in 8 bits.

    scaled_dot_product_attention(q, k, v)  →  sla(q, k, v, proj_l)  or  sagesla(q, k, v, proj_l)

q, k and v are projections of one hidden state: cross-attention stays dense. Each query block
attends exactly to a share `topk` of the key blocks; a linear branch over all keys, projected by
`proj_l`, makes up for the rest. `proj_l` comes with checkpoints that are tuned for SLA.

What is reported as agreement is that of the operator with every block kept and no linear branch,
which is dense attention; a sparse result has no right value to compare with but the tuned model's.
Source: SLA, arXiv 2509.24006.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.base import Numerics, Pass, PassOptions, PassResult, register_pass
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, rewrite_each
from turbo_opt.compiler.skip import Skip, Skipper
from turbo_opt.errors import BadInput
from turbo_opt.ir.edit import module_path
from turbo_opt.ir.facts import Fact
from turbo_opt.ir.program import Denoiser, Program
from turbo_opt.ir.weights import cast
from turbo_opt.passes._attention import (
    PVFormat,
    is_dense_attention,
    is_sage_attention,
    objection_to_pv,
    pv_format,
    unlike_self_attention,
)
from turbo_opt.targets import Target

HEAD_DIM = 128
_HOPPER = (9, 0)
Share = Annotated[float, Field(gt=0, le=1)]
BlockSize = Literal["auto", 64, 128]


@register_pass
class SparseAttention(Pass):
    name = "sparse-attention"
    requires = frozenset({Fact.CANONICAL})
    numerics = Numerics.RETRAINED
    missing_weights_hint = (
        "it is not tuned for SLA; `proj_l: zero` runs the training-free form, without the "
        "linear branch; `turbo-opt calibrate sla` tunes a model, or with --closed-form only "
        "solves its proj_l"
    )

    class Options(PassOptions):
        mode: Literal["sagesla", "sla"] = Field(
            "sagesla", description="sparse branch in 8 bits as in SageAttention, or in 16 bits"
        )
        topk: Share | tuple[Share, ...] = Field(
            0.1,
            description="share of the key blocks that a query block keeps, or a list with one "
            "for each self-attention layer, in the order they run",
        )
        block_q: BlockSize = Field(
            "auto", description="tokens per query block; auto: 64 on Hopper, else 128"
        )
        block_k: BlockSize = Field(
            "auto", description="tokens per key block; auto: 128 on Hopper, else 64"
        )
        feature_map: Literal["softmax", "elu", "relu"] = Field(
            "softmax", description="feature map of the linear branch"
        )
        pv: PVFormat = Field(
            "auto",
            description="operands of P·v in sagesla; auto: fp8 on GPUs that have it (sm89 on)",
        )
        proj_l: Literal["checkpoint", "zero"] = Field(
            "checkpoint",
            description="projection of the linear branch: the checkpoint's `proj_l`, or none",
        )
        skip: Skip = Field(Skip(), description="self-attention layers that stay dense")

        @model_validator(mode="after")
        def _pv_belongs_to_sagesla(self) -> SparseAttention.Options:
            if self.mode == "sla" and self.pv != "auto":
                raise ValueError(f"pv {self.pv!r} is an option of mode 'sagesla', mode is 'sla'")
            return self

    @classmethod
    def objection_to(cls, options: PassOptions, target: Target) -> str | None:
        assert isinstance(options, cls.Options)
        return objection_to_pv(options.pv, target)

    @classmethod
    def missing_weights(cls, options: PassOptions, program: Program) -> list[str]:
        assert isinstance(options, cls.Options)
        if options.proj_l == "zero":
            return []
        skipper = _skipper(program, options.skip)
        return [
            name
            for denoiser in program
            for layer in self_attention(denoiser)
            if not skipper.skips(denoiser, module_path(layer))
            for name in _projection_names(layer)
            if name not in denoiser.unread
        ]

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        rewrite = _SparseAttention(program, options, context.target)
        result = rewrite_each(
            program, context, rewrite.match, rewrite.replace, compare=with_every_block
        )
        rewrite.skipper.check()
        return result


class _SparseAttention:
    """The match and the rewrite, with what they share within one run of the pass."""

    def __init__(
        self, program: Program, options: SparseAttention.Options, target: Target | None
    ) -> None:
        self.skipper = _skipper(program, options.skip)
        self._options = options
        self._blocks = block_sizes(options, target)
        self._pv = pv_format(options.pv, target)
        self._topk = {denoiser.name: _shares(denoiser, options.topk) for denoiser in program}

    def match(self, node: Node, denoiser: Denoiser) -> Found | Miss | None:
        """A dense self-attention without mask."""
        if is_sage_attention(node):
            return Miss("it is sage_attention already: sparse-attention goes before that pass")
        if not is_dense_attention(node):
            return None
        objection = unlike_self_attention(node, HEAD_DIM)
        if objection is not None:
            return Miss(objection)
        if self.skipper.skips(denoiser, module_path(node)):
            return Miss("skipped by the recipe")
        operands = tuple(node.args[:3])
        return Found(node, node, operands, {"topk": self._topk[denoiser.name][node]})  # type: ignore[arg-type]

    def replace(self, found: Found, editor: Editor) -> Node:
        """The sparse operator on the same heads, with the layer's projection."""
        weight = bias = None
        if self._options.proj_l == "checkpoint":
            weight, bias = _projection(found.anchor, editor)
        sparsity = (found.parts["topk"], *self._blocks, self._options.feature_map)
        arguments = (*found.inputs, weight, bias, *sparsity)
        if self._options.mode == "sla":
            return editor.call(torch.ops.turbo_opt.sla.default, *arguments)
        return editor.call(torch.ops.turbo_opt.sagesla.default, *arguments, self._pv)


def with_every_block(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Dense attention, and the sparse operator where it leaves nothing out."""
    q, k, v, _, _, _, *settings = new.args
    return [(found.output, editor.call(new.target, q, k, v, None, None, 1.0, *settings))]  # type: ignore[arg-type]


def self_attention(denoiser: Denoiser) -> list[Node]:
    """The dense self-attention layers of a denoiser that the pass can replace, as they run."""
    return [
        node
        for node in denoiser.graph.nodes
        if is_dense_attention(node) and unlike_self_attention(node, HEAD_DIM) is None
    ]


def block_sizes(options: SparseAttention.Options, target: Target | None) -> tuple[int, int]:
    """(block_q, block_k), what is `auto` as the released weights have it: 64×128 on Hopper."""
    hopper = target is not None and target.compute_capability == _HOPPER
    block_q, block_k = (64, 128) if hopper else (128, 64)
    return (
        block_q if options.block_q == "auto" else options.block_q,
        block_k if options.block_k == "auto" else options.block_k,
    )


def _shares(denoiser: Denoiser, topk: float | tuple[float, ...]) -> dict[Node, float]:
    """`topk` of every self-attention layer."""
    layers = self_attention(denoiser)
    if isinstance(topk, float):
        return dict.fromkeys(layers, topk)
    if len(topk) != len(layers):
        raise BadInput(
            f"sparse-attention: topk lists {len(topk)} numbers, {denoiser.name} has "
            f"{len(layers)} self-attention layers"
        )
    return dict(zip(layers, topk, strict=True))


def _skipper(program: Program, skip: Skip) -> Skipper:
    return Skipper(
        program,
        skip,
        pass_name=SparseAttention.name,
        layer="self-attention layer",
        example="blocks.0.attn1",
    )


def _projection_names(layer: Node) -> tuple[str, str]:
    module = module_path(layer)
    stem = f"{module}.proj_l" if module else "proj_l"
    return f"{stem}.weight", f"{stem}.bias"


def _projection(layer: Node, editor: Editor) -> tuple[Node, Node]:
    """Placeholders of the layer's `proj_l`, float32: weight (D, D) and bias (D,).

    Raises:
        BadInput: the checkpoint's has another shape.
    """
    placeholders = []
    shapes = ((HEAD_DIM, HEAD_DIM), (HEAD_DIM,))
    for name, shape in zip(_projection_names(layer), shapes, strict=True):
        tensor = editor.denoiser.unread.pop(name)
        if tensor.shape != shape:
            raise BadInput(
                f"sparse-attention: {name} has shape {list(tensor.shape)}, needs {list(shape)}"
            )
        placeholders.append(editor.weight(name, cast(tensor, torch.float32)))
    return placeholders[0], placeholders[1]
