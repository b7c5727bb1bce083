"""Replace self-attention by sparse-linear attention (SLA), in 16 or in 8 bits.

    scaled_dot_product_attention(q, k, v)  →  sla(q, k, v, proj_l)  or  sagesla(q, k, v, proj_l)
                                              or  sla2(q, k, v, router, alpha)

q, k and v are projections of one hidden state: cross-attention stays dense. Each query block
attends exactly to a share `topk` of the key blocks; a linear branch over all keys, projected by
`proj_l`, makes up for the rest. `proj_l` comes with checkpoints that are tuned for SLA. SLA2 has a
learned router choose the blocks, the linear branch see the others, and a learned ratio mix the two.

What is reported as agreement is that of the operator with every block kept and no linear branch,
which is dense attention; a sparse result has no right value to compare with but the tuned model's.
Sources: SLA, arXiv 2509.24006; SLA2, arXiv 2602.12675.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch.fx import Node

import turbo_opt.kernels  # noqa: F401  (registers turbo_opt::*)
from turbo_opt.compiler.base import (
    LayerChoice,
    Numerics,
    Pass,
    PassOptions,
    PassResult,
    register_pass,
)
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.rewrite import Editor, Found, Miss, rewrite_each, tensor_of
from turbo_opt.compiler.scales import measured_scales, scales_identity
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
from turbo_opt.passes._layer_choices import choose_shares
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
        "solves its proj_l; `merge-weights` before this pass takes the tuning of another checkpoint"
    )

    class Options(PassOptions):
        mode: Literal["sagesla", "sla", "sla2"] = Field(
            "sagesla",
            description="SLA, its sparse branch in 8 bits as in SageAttention, or in 16 bits; or "
            "SLA2, by the checkpoint's `router` and `alpha`",
        )
        topk: Share | tuple[Share, ...] = Field(
            0.1,
            description="share of the key blocks that a query block keeps, or a list with one "
            "for each self-attention layer, in the order they run",
        )
        scales: str | None = Field(
            None,
            description="file of `turbo-opt calibrate scales`, a name in the recipe's `weights` or "
            "a path: each layer gets one of its shares, so that the measured errors are least and "
            "the mean is at most `topk`",
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
            description="operands of P·v where q and k are int8; auto: fp8 on GPUs that have it "
            "(sm89 on)",
        )
        qk: Literal["auto", "int8", "16bit"] = Field(
            "auto", description="operands of q·kᵀ in sla2; auto: int8"
        )
        proj_l: Literal["checkpoint", "zero"] = Field(
            "checkpoint",
            description="projection of SLA's linear branch: the checkpoint's `proj_l`, or none",
        )
        skip: Skip = Field(Skip(), description="self-attention layers that stay dense")

        @model_validator(mode="after")
        def _pv_belongs_to_sagesla(self) -> SparseAttention.Options:
            if self.mode == "sla" and self.pv != "auto":
                raise ValueError(f"pv {self.pv!r} is an option of mode 'sagesla', mode is 'sla'")
            if self.qk == "16bit" and self.pv == "fp8":
                raise ValueError("pv 'fp8' goes with qk 'int8', qk is '16bit'")
            return self

        @model_validator(mode="after")
        def _belongs_to_its_mode(self) -> SparseAttention.Options:
            if self.mode != "sla2" and self.qk != "auto":
                raise ValueError(
                    f"qk {self.qk!r} is an option of mode 'sla2', mode is {self.mode!r}"
                )
            if self.mode == "sla2" and self.proj_l == "zero":
                raise ValueError("mode 'sla2' has no proj_l to leave out: set it to 'checkpoint'")
            return self

        @model_validator(mode="after")
        def _one_share_to_divide(self) -> SparseAttention.Options:
            if self.scales is not None and not isinstance(self.topk, float):
                raise ValueError("with scales, topk is the mean share: one number, not a list")
            if self.scales is not None and self.mode == "sla2":
                raise ValueError("scales hold the errors of SLA, mode is 'sla2'")
            return self

    @classmethod
    def files_read(cls, options: PassOptions, checkpoints: Mapping[str, str]) -> Sequence[str]:
        assert isinstance(options, cls.Options)
        return [] if options.scales is None else [scales_identity(options.scales, checkpoints)]

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
            for name in _weight_shapes(layer, options.mode)
            if name not in denoiser.unread
        ]

    @classmethod
    def hint_about_weights(cls, options: PassOptions) -> str:
        assert isinstance(options, cls.Options)
        if options.mode == "sla2":
            return "it has no router of SLA2; `turbo-opt calibrate router` trains one"
        return cls.missing_weights_hint

    def run(self, program: Program, options: PassOptions, context: PassContext) -> PassResult:
        assert isinstance(options, self.Options)
        rewrite = _SparseAttention(program, options, context)
        result = rewrite_each(
            program, context, rewrite.match, rewrite.replace, compare=with_every_block
        )
        rewrite.skipper.check()
        return replace(result, choices=rewrite.choices)


class _SparseAttention:
    """The match and the rewrite, with what they share within one run of the pass."""

    def __init__(
        self, program: Program, options: SparseAttention.Options, context: PassContext
    ) -> None:
        target = context.target
        self.skipper = _skipper(program, options.skip)
        self._options = options
        self._blocks = block_sizes(options, target)
        self._pv = pv_format(options.pv, target)
        self.choices: tuple[LayerChoice, ...] = ()
        if options.scales is None:
            self._topk = {denoiser.name: _shares(denoiser, options.topk) for denoiser in program}
        else:
            self._topk = self._measured_shares(program, options.scales, context)

    def _measured_shares(
        self, program: Program, scales: str, context: PassContext
    ) -> dict[str, dict[Node, float]]:
        """`topk` of every layer that is not skipped, with the option's as their mean."""
        measured = measured_scales(scales, context.checkpoints, program)
        shares = {}
        for denoiser in program:
            found = measured[denoiser.name]
            if (found.block_q, found.block_k) != self._blocks:
                raise BadInput(
                    f"sparse-attention: the scales are of blocks of {found.block_q}×"
                    f"{found.block_k} tokens, the pass has {self._blocks[0]}×{self._blocks[1]}; "
                    "measure with a recipe of this target, or set block_q and block_k"
                )
            names = {
                layer: module_path(layer)
                for layer in self_attention(denoiser)
                if not self.skipper.skips(denoiser, module_path(layer))
            }
            assert isinstance(self._options.topk, float)
            topk, places = self._options.topk, list(names.values())
            chosen = choose_shares(denoiser.name, places, found, topk)
            shares[denoiser.name] = {layer: chosen[name][0] for layer, name in names.items()}
            self.choices += tuple(choice for _, choice in chosen.values())
        return shares

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
        weights: Sequence[Node | None] = (None, None)
        if self._options.proj_l == "checkpoint":
            weights = _weights(found.anchor, self._options.mode, editor)
        sparsity = (found.parts["topk"], *self._blocks, self._options.feature_map)
        arguments = (*found.inputs, *weights, *sparsity)
        if self._options.mode == "sla2":
            formats = ("16bit", "16bit") if self._options.qk == "16bit" else ("int8", self._pv)
            return editor.call(torch.ops.turbo_opt.sla2.default, *arguments, *formats)
        if self._options.mode == "sla":
            return editor.call(torch.ops.turbo_opt.sla.default, *arguments)
        return editor.call(torch.ops.turbo_opt.sagesla.default, *arguments, self._pv)


def with_every_block(found: Found, new: Node, editor: Editor) -> Sequence[tuple[Node, Node]]:
    """Dense attention, and the sparse operator where it leaves nothing out."""
    arguments = list(new.args)
    if new.target is torch.ops.turbo_opt.sla2.default:
        arguments[7] = 1.0
    else:
        arguments[3:6] = None, None, 1.0
    return [(found.output, editor.call(new.target, *arguments))]  # type: ignore[arg-type]


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


def _weight_shapes(layer: Node, mode: str) -> dict[str, tuple[int, ...]]:
    """The weights that the operator of a mode needs of a layer, in its order, with their shapes."""
    square = (HEAD_DIM, HEAD_DIM)
    query = layer.args[0]
    assert isinstance(query, Node)
    heads = int(tensor_of(query).shape[1])
    leaves: dict[str, tuple[int, ...]] = {"proj_l.weight": square, "proj_l.bias": (HEAD_DIM,)}
    if mode == "sla2":
        leaves = {
            "router.proj_q.weight": square,
            "router.proj_k.weight": square,
            "alpha.weight": (heads, HEAD_DIM),
            "alpha.bias": (heads,),
        }
    module = module_path(layer)
    return {f"{module}.{leaf}" if module else leaf: shape for leaf, shape in leaves.items()}


def _weights(layer: Node, mode: str, editor: Editor) -> list[Node]:
    """Placeholders of the layer's weights for a mode, float32.

    Raises:
        BadInput: the checkpoint's have another shape.
    """
    placeholders = []
    for name, shape in _weight_shapes(layer, mode).items():
        tensor = editor.denoiser.unread.pop(name)
        if tensor.shape != shape:
            raise BadInput(
                f"sparse-attention: {name} has shape {list(tensor.shape)}, needs {list(shape)}"
            )
        placeholders.append(editor.weight(name, cast(tensor, torch.float32)))
    return placeholders
