"""What is known to hold of a Program. Passes require, establish and invalidate facts."""

from __future__ import annotations

from enum import StrEnum


class Fact(StrEnum):
    """A property that passes may rely on without looking at the graph again."""

    CANONICAL = "canonical"
    """The graph is in the normal form that `canonicalize` documents."""

    NORMS_FUSED = "norms-fused"
    """LayerNorm+modulation and RMSNorm are single operators."""

    LINEAR_QUANTIZED = "linear-quantized"
    """At least one linear layer runs on quantized operands."""

    CHANNELS_BALANCED = "channels-balanced"
    """Norms and the linear layers that read them hold factors that cancel."""

    INVARIANTS_HOISTED = "invariants-hoisted"
    """Denoisers name the inputs that define their stages; see `ir.stages`."""

    DISTILLED = "distilled"
    """The schedule is that of a step-distilled student."""
