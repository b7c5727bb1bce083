"""The pass manager: runs a checked pipeline, one verified pass after the other."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from turbo_opt.compiler.base import PassResult
from turbo_opt.compiler.cache import PassCache, next_key
from turbo_opt.compiler.context import PassContext
from turbo_opt.compiler.instruments import Instrument
from turbo_opt.compiler.invariants import check_invariants
from turbo_opt.compiler.reproducer import write_reproducer
from turbo_opt.compiler.validation import PlannedPass, check_weights, facts_after
from turbo_opt.compiler.verification import LocalVerifier
from turbo_opt.errors import PassFailed, TurboOptError
from turbo_opt.ir.printer import op_count_diff, op_counts
from turbo_opt.ir.program import Program

_SHARE = {"all": 1.0, "sample": 0.1, "off": 0.0}


@dataclass(frozen=True)
class Verification:
    """How matches are checked: which of them, from which seed, against which budgets.

    Attributes:
        mode: `all` matches, a tenth of them (`sample`), or none (`off`).
        budgets: pass name → least SQNR in dB; the tier's own where a name is missing or None.
    """

    mode: Literal["all", "sample", "off"] = "all"
    seed: int = 0
    budgets: dict[str, float | None] = field(default_factory=dict)

    def verifier(self, planned: PlannedPass) -> LocalVerifier | None:
        """The checker for one pass; None when nothing is to be checked."""
        if self.mode == "off":
            return None
        return LocalVerifier(
            planned.pass_class.numerics,
            minimum_db=self.budgets.get(planned.spec.name),
            seed=self.seed,
            share=_SHARE[self.mode],
        )

    def key(self, planned: PlannedPass) -> list[Any]:
        """What a cached result's verification depended on."""
        return [self.mode, self.seed, str(self.budgets.get(planned.spec.name))]


class PassManager:
    """Runs passes in the order given.

    Args:
        pipeline: from `validate_pipeline`.
        verification: how each match is checked.
        instruments: told of every pass.
        cache: where finished programs are kept; None keeps none.
        resume: start from the last pass whose result is in the cache.
        reproducer: where a failing pass leaves its reproducer; None leaves none.
    """

    def __init__(
        self,
        pipeline: Sequence[PlannedPass],
        *,
        verification: Verification = Verification(),
        instruments: Sequence[Instrument] = (),
        cache: PassCache | None = None,
        resume: bool = False,
        reproducer: Path | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._verification = verification
        self._instruments = instruments
        self._cache = cache
        self._resume = resume
        self._reproducer = reproducer

    def run(self, program: Program, key: str = "") -> Program:
        """The optimized program; `program` itself stays as it is.

        Args:
            key: what `program` is known by in the cache (`cache.first_key`).

        Raises:
            BadInput: a pass's options do not fit the model, or weights it needs are missing.
            BudgetExceeded: a replacement is further off than its budget.
            PassFailed: a required pass matched nothing, or broke the program.
        """
        check_weights(self._pipeline, program)
        keys = self._keys(key)
        start, program = self._restore(program, keys)
        if any(planned.pass_class.brings_weights for planned in self._pipeline[:start]):
            check_weights(self._pipeline[start:], program)
        for index in range(start, len(self._pipeline)):
            program = self._run_one(index, program)
            if self._pipeline[index].pass_class.brings_weights:
                check_weights(self._pipeline[index + 1 :], program)
            if self._cache is not None and key:
                self._cache.put(keys[index], program)
        return program

    def _keys(self, key: str) -> list[str]:
        keys = []
        for planned in self._pipeline:
            key = next_key(key, planned, self._verification.key(planned))
            keys.append(key)
        return keys

    def _restore(self, program: Program, keys: Sequence[str]) -> tuple[int, Program]:
        if self._resume and self._cache is not None:
            for index in reversed(range(len(keys))):
                stored = self._cache.get(keys[index])
                if stored is not None:
                    return index + 1, self._announce(stored)
        return 0, program

    def _announce(self, stored: Program) -> Program:
        """Tell of the passes that a stored program went through, and mark them as taken over."""
        history = tuple({**record, "cached": True} for record in stored.history)
        for index, record in enumerate(history):
            self._tell("after_pass", index, record, stored)
        return replace(stored, history=history)

    def _run_one(self, index: int, before: Program) -> Program:
        planned = self._pipeline[index]
        self._tell("before_pass", index, planned, before)
        verifier = self._verification.verifier(planned)
        context = PassContext(
            verifier,
            tick=lambda: self._tell("match_found"),
            target=planned.target,
            checkpoints=planned.checkpoints,
        )
        started = time.perf_counter()
        try:
            result = planned.pass_class().run(before.fork(), planned.options, context)
            _check_result(planned, result)
        except Exception as error:
            raise self._failure(planned, before, error) from error
        facts = facts_after(planned.pass_class, before.facts)
        record = _record(planned, before, result, verifier, time.perf_counter() - started)
        after = replace(result.program, facts=facts, history=(*before.history, record))
        self._tell("after_pass", index, record, after)
        return after

    def _failure(self, planned: PlannedPass, before: Program, error: Exception) -> TurboOptError:
        kind = type(error) if isinstance(error, TurboOptError) else PassFailed
        message = (
            str(error)
            if str(error).startswith(planned.spec.name)
            else (f"{planned.spec.name}: {error or type(error).__name__}")
        )
        if self._reproducer is not None and kind.exit_code != 2:
            path = write_reproducer(self._reproducer, before, planned.spec, error)
            message += f"\nrun it again with: turbo-opt reproduce {path}"
        return kind(message)

    def _tell(self, event: str, *args: Any) -> None:
        for instrument in self._instruments:
            getattr(instrument, event)(*args)


def _check_result(planned: PlannedPass, result: PassResult) -> None:
    check_invariants(result.program)
    optional = planned.spec.optional or planned.pass_class.may_match_nothing
    if not result.matches and not optional:
        reasons = Counter(miss.reason for miss in result.near_misses)
        why = "; ".join(f"{count}× {reason}" for reason, count in reasons.most_common(3))
        raise PassFailed(
            f"{planned.spec.name} matched nothing"
            + (f" (near misses: {why})" if why else "")
            + "; mark it 'optional: true' where that is expected"
        )


def _record(
    planned: PlannedPass,
    before: Program,
    result: PassResult,
    verifier: LocalVerifier | None,
    seconds: float,
) -> dict[str, Any]:
    """The pass's line in the history; JSON values only."""
    after = result.program
    worst = verifier.worst() if verifier is not None else None
    reasons = Counter((miss.denoiser, miss.reason) for miss in result.near_misses)
    examples = {(miss.denoiser, miss.reason): miss for miss in reversed(result.near_misses)}
    return {
        "name": planned.spec.name,
        "text": str(planned.spec),
        "options": planned.options.model_dump(mode="json"),
        "numerics": planned.pass_class.numerics.value,
        "matches": len(result.matches),
        "near_misses": [
            {
                "denoiser": denoiser,
                "reason": reason,
                "count": count,
                "example": examples[denoiser, reason].module or examples[denoiser, reason].node,
            }
            for (denoiser, reason), count in reasons.items()
        ],
        "choices": [asdict(choice) for choice in result.choices],
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "weight_bytes_before": before.weight_bytes,
        "weight_bytes_after": after.weight_bytes,
        "op_count_change": {
            item.name: op_count_diff(
                op_counts(before.denoisers[item.name].exported), op_counts(item.exported)
            )
            for item in after
            if item.name in before.denoisers
        },
        "verification": {
            "checked": len(verifier.checks) if verifier is not None else 0,
            "worst_sqnr_db": _finite(worst.sqnr_db) if worst is not None else None,
            "bitwise": worst is not None and worst.sqnr_db == float("inf"),
            "worst_node": worst.node if worst is not None else None,
            "worst_module": worst.module if worst is not None else None,
        },
        "stats": dict(result.stats),
        "cached": False,
    }


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
