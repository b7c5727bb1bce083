"""sage_attention at the models' shapes: to the clip's own tokens, and to a prompt's 512."""

from __future__ import annotations

from importlib.metadata import version

import torch

from benchmarks.kernels._harness import (
    InputSet,
    Session,
    dense_attention,
    provider,
    sqnr_db,
)
from benchmarks.kernels._sparse import (
    HEAD_DIM,
    eight_bit_matmul,
    heads_of_one_product,
    record_name,
)
from benchmarks.results import Ceiling
from turbo_opt.kernels.sparse_rules import as_heads

PROMPT = 512
_PACKAGE = "sageattention"
# A relative error of 0.05 against attention in 16 bits. Triton's interpreter truncates to fp8.
LEAST_SQNR_DB, LEAST_DRY_SQNR_DB = 26.0, 18.0


def bench(session: Session) -> None:
    for heads, tokens in session.attention:
        for keys in (tokens, 70 if session.dry else PROMPT):
            _bench(session, heads, tokens, keys)


def _bench(session: Session, heads: int, tokens: int, keys: int) -> None:
    """Check and time each provider; the default one is recorded as `sage_attention/SHAPE_ms`."""

    def make() -> InputSet:
        q, _, _ = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, tokens))
        _, k, v = (as_heads(x, HEAD_DIM) for x in heads_of_one_product(session, heads, keys))
        return q, k, v, None, "fp8"

    sets = session.input_sets(make)
    shape = f"{heads}x{tokens}x{keys}"
    dense = {"sdpa_dense_bf16": session.time(dense_attention, [args[:3] for args in sets])}
    operations = 4 * heads * tokens * keys * HEAD_DIM
    exact = dense_attention(*sets[0][:3])
    _, names = session.usable("sage_attention", sets[0])
    for each in names:
        with provider("sage_attention", each) as call:
            sqnr = sqnr_db(exact, call(*sets[0]))
            least = LEAST_DRY_SQNR_DB if session.dry else LEAST_SQNR_DB
            session.check(f"sage_attention/{shape}/{each}", sqnr, least)
            timing = session.time(call, sets)
        facts = _facts(each)
        rate = eight_bit_matmul(session, facts["pv"])
        floor = Ceiling(operations / rate.value / 1e9, "ms", f"its products at {rate.what}")
        session.record_time(
            record_name("sage_attention", names, each, shape),
            timing,
            dense,
            floor,
            quality={"sqnr_db_vs_sdpa": sqnr},
            config={"provider": each, **facts, "tops": operations / timing.ms / 1e9},
        )
    del sets, exact
    if not session.dry:
        torch.cuda.empty_cache()


def _facts(name: str) -> dict[str, str]:
    """What P·v is multiplied in by a provider, and the release of the package that it is from."""
    if name != _PACKAGE:
        return {"pv": "fp8"}
    release = version(_PACKAGE)
    # From release 2 on it is e4m3, where the GPU has products of that.
    return {"pv": "16bit" if release.startswith("1.") else "fp8", "release": release}
