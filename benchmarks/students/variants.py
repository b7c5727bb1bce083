"""The rows of the table: whose weights, how sampled, how sparse, how quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TEACHER, CONSISTENCY, RCM, SLA, JOINT = "teacher", "consistency", "rcm", "sla", "rcm-sla"
CLOSED_FORM = "closed-form"
STUDENT, MERGED = "student", "merged"
_TOPK = (0.1, 0.2, 0.3)
_FEW = (4, 2, 1)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        weights: `teacher`; a student by its file; `closed-form`, the teacher with `proj_l` solved
            at topk 0.2; `student`, the better of `consistency` and `rcm`; or `merged`,
            student + (sla − teacher).
        steps: of a clip.
        guided: by the teacher's own sampler with guidance; else as rCM's students are sampled.
        topk: share of key blocks that self-attention keeps; None is dense.
        tuned: with the student's `proj_l`; else without a linear branch.
        scheme: of W8A8, by the real passes; None leaves the weights as they are.
    """

    weights: str
    steps: int
    guided: bool = False
    topk: float | None = None
    tuned: bool = True
    scheme: str | None = None

    @property
    def name(self) -> str:
        """Such as `merged-topk0.2-int8-block/4-steps`."""
        sparse = "" if self.topk is None else f"-topk{self.topk:g}"
        untuned = "" if self.topk is None or self.tuned else "-untuned"
        scheme = f"-{self.scheme}" if self.scheme else ""
        guided = "-guided" if self.guided else ""
        return f"{self.weights}{sparse}{untuned}{scheme}/{self.steps}-steps{guided}"

    @property
    def evaluations(self) -> int:
        """Of the network, for one clip."""
        return self.steps * (2 if self.guided else 1)


def variants(dry: bool = False) -> list[Variant]:
    """The table, the teacher first; a dry run takes fewer steps."""
    many = 2 if dry else 50
    rows = [Variant(TEACHER, many, guided=True), Variant(TEACHER, 4, guided=True)]
    rows += [Variant(TEACHER, steps) for steps in _FEW]
    rows += [Variant(name, steps) for name in (CONSISTENCY, RCM) for steps in _FEW]
    rows += [
        Variant(name, many, guided=True, topk=topk, tuned=name != TEACHER)
        for name in (TEACHER, CLOSED_FORM, SLA)
        for topk in _TOPK
    ]
    rows += [Variant(STUDENT, 4, topk=topk, tuned=False) for topk in _TOPK]
    rows += [Variant(name, 4, topk=topk) for name in (MERGED, JOINT) for topk in _TOPK]
    rows += [Variant(STUDENT, 4, scheme="int8-block")]
    rows += [Variant(MERGED, 4, topk=topk, scheme="int8-block") for topk in _TOPK]
    if not dry:  # a CPU has no FP8
        rows.append(Variant(MERGED, 4, topk=0.2, scheme="fp8-block"))
    return rows


def better_student(done: Mapping[Variant, Mapping[str, float]]) -> str:
    """`consistency` or `rcm`: whose clips of few steps are right more often; `rcm` if equal."""
    totals = {
        name: sum(done.get(Variant(name, steps), {}).get("all_right", 0.0) for steps in _FEW)
        for name in (RCM, CONSISTENCY)
    }
    return max(totals, key=lambda name: totals[name])
