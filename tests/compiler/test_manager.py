"""The pass manager: order, cache, resume, reproducers, invariants, instruments."""

from __future__ import annotations

import json

import pytest
import torch

from tests.passes.graphs import ops_of, program_of
from turbo_opt.compiler import base
from turbo_opt.compiler.base import Numerics, Pass, PassResult, register_pass
from turbo_opt.compiler.cache import PassCache, first_key
from turbo_opt.compiler.instruments import BaseInstrument, IRDump
from turbo_opt.compiler.manager import PassManager, Verification
from turbo_opt.compiler.pipeline import parse_pipeline
from turbo_opt.compiler.reproducer import read_reproducer
from turbo_opt.compiler.rewrite import Found, is_call, rewrite_each
from turbo_opt.compiler.validation import validate_pipeline
from turbo_opt.errors import BadInput, BudgetExceeded, PassFailed
from turbo_opt.ir.weights import constant
from turbo_opt.targets import get_target

aten = torch.ops.aten
X = torch.randn(2, 6, 8)


@pytest.fixture
def registry():
    """Passes registered in a test are forgotten after it."""
    base.registered_passes()
    known = dict(base._PASSES)
    yield
    base._PASSES.clear()
    base._PASSES.update(known)


def relu_rewriter(name, replacement, numerics=Numerics.EXACT, **attributes):
    """A pass that puts `replacement(editor, x)` in the place of relu(x)."""

    def match(node, denoiser):
        if is_call(node, aten.relu.default):
            return Found(node, node, tuple(node.all_input_nodes))
        return None

    def run(self, program, options, context):
        return rewrite_each(
            program, context, match, lambda found, editor: replacement(editor, found.inputs[0])
        )

    body = {"name": name, "numerics": numerics, "run": run, **attributes}
    return register_pass(type(name.title().replace("-", ""), (Pass,), body))


def right(editor, x):
    return editor.call(aten.clamp_min.default, x, 0)


def wrong(editor, x):
    return editor.call(aten.abs.default, x)


def manager(pipeline, **options):
    return PassManager(validate_pipeline(parse_pipeline(pipeline)), **options)


def relu_program():
    return program_of(lambda x: torch.relu(x) + 1, X)


def test_a_right_rewrite_passes_and_the_input_program_is_left_alone(registry):
    relu_rewriter("right", right)
    before = relu_program()
    after = manager("right").run(before)
    assert ops_of(after) == ["aten.clamp_min", "aten.add.Tensor"]
    assert ops_of(before) == ["aten.relu", "aten.add.Tensor"]
    assert after.history[0]["verification"] == {
        "checked": 1,
        "worst_sqnr_db": None,
        "bitwise": True,
        "worst_node": "relu",
        "worst_module": "",
    }


def test_a_wrong_rewrite_is_refused_with_node_error_and_budget(registry):
    relu_rewriter("wrong", wrong)
    with pytest.raises(BudgetExceeded, match=r"wrong: net, node relu.*dB SQNR.*'exact' is inf dB"):
        manager("wrong").run(relu_program())


def test_a_recipe_budget_overrides_the_tier(registry):
    relu_rewriter("wrong", wrong)
    loose = Verification(budgets={"wrong": -20.0})
    record = manager("wrong", verification=loose).run(relu_program()).history[0]
    assert record["verification"]["worst_sqnr_db"] < 10


def test_verification_off_checks_nothing(registry):
    relu_rewriter("wrong", wrong)
    record = manager("wrong", verification=Verification("off")).run(relu_program()).history[0]
    assert record["verification"]["checked"] == 0


def test_a_result_of_another_dtype_is_refused(registry):
    relu_rewriter("half", lambda editor, x: editor.call(aten.to.dtype, x, torch.float16))
    with pytest.raises(BudgetExceeded, match=r"gives torch.float16 \[2, 6, 8\] instead of"):
        manager("half").run(relu_program())


def test_nan_never_passes(registry):
    relu_rewriter("nan", lambda editor, x: editor.call(aten.log.default, x), Numerics.QUANTIZES)
    with pytest.raises(BudgetExceeded, match="-inf dB"):
        manager("nan").run(relu_program())


def test_a_failing_pass_leaves_a_reproducer_that_fails_again(registry, tmp_path):
    relu_rewriter("wrong", wrong)
    folder = tmp_path / "out.reproducer"
    with pytest.raises(BudgetExceeded, match="turbo-opt reproduce"):
        manager("wrong", reproducer=folder).run(relu_program())
    program, specs = read_reproducer(folder)
    assert [spec.name for spec in specs] == ["wrong"]
    assert "BudgetExceeded" in (folder / "error.txt").read_text()
    with pytest.raises(BudgetExceeded):
        PassManager(validate_pipeline(specs, facts=program.facts)).run(program)


def test_bad_input_leaves_no_reproducer(tmp_path, registry):
    def run(self, program, options, context):
        raise BadInput("a selector that matches nothing")

    register_pass(type("Picky", (Pass,), {"name": "picky", "numerics": Numerics.EXACT, "run": run}))
    with pytest.raises(BadInput):
        manager("picky", reproducer=tmp_path / "r").run(relu_program())
    assert not (tmp_path / "r").exists()


def test_a_pass_that_breaks_the_weights_is_caught(registry):
    def run(self, program, options, context):
        (denoiser,) = program
        del denoiser.weights["w"]
        return PassResult(program)

    attributes = {
        "name": "breaks",
        "numerics": Numerics.EXACT,
        "run": run,
        "may_match_nothing": True,
    }
    register_pass(type("Breaks", (Pass,), attributes))
    program = program_of(lambda x, w: x * w, X, w=torch.randn(8))
    with pytest.raises(PassFailed, match="'w' is in the graph but not the weights"):
        manager("breaks").run(program)


def test_optional_lets_a_pass_match_nothing(registry):
    relu_rewriter("right", right)
    program = program_of(lambda x: x + 1, X)
    with pytest.raises(PassFailed, match="matched nothing; mark it 'optional: true'"):
        manager("right").run(program)
    assert manager("right?").run(program).history[0]["matches"] == 0


def test_needed_weights_are_named(registry):
    relu_rewriter("right", right, needs_weights=("*.proj_l.weight",))
    with pytest.raises(BadInput, match=r"right needs weights named \*\.proj_l\.weight"):
        manager("right").run(relu_program())


class Witness(BaseInstrument):
    """Remembers which passes really ran."""

    def __init__(self):
        self.ran, self.done, self.matches = [], [], 0

    def before_pass(self, index, planned, program):
        self.ran.append(planned.spec.name)

    def match_found(self):
        self.matches += 1

    def after_pass(self, index, record, program):
        self.done.append((record["name"], record["cached"]))


def run_cached(pipeline, cache, program, resume):
    witness = Witness()
    made = manager(pipeline, cache=cache, resume=resume, instruments=[witness])
    result = made.run(program, first_key(program.digest()))
    return result, witness


def test_resume_starts_after_the_last_finished_pass(tmp_path, registry):
    relu_rewriter("right", right)
    cache, program = PassCache(tmp_path / "cache"), relu_program()
    run_cached("canonicalize", cache, program, resume=False)
    result, witness = run_cached("canonicalize,right", cache, program, resume=True)
    assert witness.ran == ["right"]
    assert witness.done == [("canonicalize", True), ("right", False)]
    assert ops_of(result) == ["aten.clamp_min", "aten.add.Tensor"]
    again, witness = run_cached("canonicalize,right", cache, program, resume=True)
    assert witness.ran == []
    assert again.digest() == result.digest()


def test_without_resume_everything_runs(tmp_path, registry):
    relu_rewriter("right", right)
    cache, program = PassCache(tmp_path / "cache"), relu_program()
    run_cached("right", cache, program, resume=False)
    assert run_cached("right", cache, program, resume=False)[1].ran == ["right"]


@pytest.mark.parametrize("change", ["options", "weights", "graph", "unread"])
def test_the_cache_tells_contents_apart(tmp_path, change):
    cache = PassCache(tmp_path / "cache")
    w, pipeline = torch.randn(8), "canonicalize,fuse-norms?{adaln=true}"
    program = program_of(lambda x, w: x * w, X, w=w)
    run_cached(pipeline, cache, program, resume=False)
    if change == "options":
        pipeline = "canonicalize,fuse-norms?{adaln=false}"
    elif change == "weights":
        program = program_of(lambda x, w: x * w, X, w=w + 1)
    elif change == "unread":
        program.denoisers["net"].unread["proj_l.weight"] = constant(w)
    else:
        program = program_of(lambda x, w: x * w * 2, X, w=w)
    assert "fuse-norms" in run_cached(pipeline, cache, program, resume=True)[1].ran


def test_a_pass_is_told_its_target_and_the_cache_tells_targets_apart(tmp_path, registry):
    told = []

    def run(self, program, options, context):
        told.append(context.target)
        return PassResult(program)

    body = {"name": "curious", "numerics": Numerics.EXACT, "may_match_nothing": True, "run": run}
    register_pass(type("Curious", (Pass,), body))
    cache, program = PassCache(tmp_path / "cache"), relu_program()
    for name in ("h200", "a100", "h200", None):
        target = get_target(name) if name is not None else None
        pipeline = validate_pipeline(parse_pipeline("curious"), target=target)
        key = first_key(program.digest())
        PassManager(pipeline, cache=cache, resume=True).run(program, key)
    assert told == [get_target("h200"), get_target("a100"), None]


def test_failures_are_never_cached(tmp_path, registry):
    relu_rewriter("wrong", wrong)
    cache, program = PassCache(tmp_path / "cache"), relu_program()
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            run_cached("wrong", cache, program, resume=True)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_damaged_cache_entry_is_dropped_and_the_pass_runs(tmp_path, registry):
    relu_rewriter("right", right)
    cache, program = PassCache(tmp_path / "cache"), relu_program()
    run_cached("right", cache, program, resume=False)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "net.pt2").write_bytes(b"damaged")
    assert run_cached("right", cache, program, resume=True)[1].ran == ["right"]


def test_ir_is_dumped_after_every_pass_with_the_change_in_operators(tmp_path, registry):
    relu_rewriter("right", right)
    manager("canonicalize,right", instruments=[IRDump(tmp_path / "ir")]).run(relu_program())
    names = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert names == [
        "000-captured.net.txt",
        "001-canonicalize.net.txt",
        "001-canonicalize.ops.json",
        "002-right.net.txt",
        "002-right.ops.json",
    ]
    changes = json.loads((tmp_path / "ir" / "002-right.ops.json").read_text())
    assert changes == {"net": {"aten.relu": -1, "aten.clamp_min": 1}}
    assert "aten.clamp_min" in (tmp_path / "ir" / "002-right.net.txt").read_text()
