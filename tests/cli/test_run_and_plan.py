"""`run` and `plan` on a model that they fit."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import invoke
from turbo_opt.artifact.manifest import read_manifest
from turbo_opt.compiler import base
from turbo_opt.compiler.base import Numerics, Pass, PassResult, register_pass

PASSES = ["canonicalize", "fuse-norms", "quantize-linear", "fuse-norm-quantize"]


@pytest.fixture
def registry(monkeypatch):
    """A registry to which a test may add passes."""
    base.registered_passes()
    monkeypatch.setattr(base, "_PASSES", dict(base._PASSES))


def test_run_reports_every_pass_and_leaves_an_artifact_with_its_report(compiled):
    folder, result = compiled
    record = json.loads(result.stdout)
    assert [row["name"] for row in record["passes"]] == PASSES
    assert all(row["matches"] for row in record["passes"])
    assert record["passes"][0]["bitwise"]
    assert record["passes"][2]["worst_sqnr_db"] > 25
    assert record["totals"]["end_to_end_sqnr_db"]["transformer"] > 20
    assert record["totals"]["weight_bytes_after"] < record["totals"]["weight_bytes_before"]
    stages = record["totals"]["stage_seconds"]
    assert list(stages) == ["capture", "plan", "passes", "end_to_end", "save", "weights"]
    assert sum(stages.values()) == pytest.approx(record["totals"]["seconds"])
    assert {"manifest.json", "report.json", "report.md", "report.html"} <= {
        item.name for item in folder.iterdir()
    }
    assert "end to end" not in result.stdout
    assert "4/4 fuse-norm-quantize" in result.stderr
    assert not folder.with_name("artifact.reproducer").exists()


def test_run_resumes_from_the_cache_dumps_graphs_and_shows_a_table(compiled, recipe, work):
    (work / "ir").mkdir()
    arguments = ("run", recipe, "--out", "out", "--resume", "--dump-ir", "ir")
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "from the cache" in result.stderr
    assert "cached" in result.stdout
    assert "worst SQNR" in result.stdout
    assert "end to end, transformer" in result.stdout
    assert (work / "out" / "manifest.json").is_file()


def test_run_takes_its_passes_from_the_command_line(recipe, work):
    pipeline = "canonicalize,fuse-norms{adaln=false},quantize-linear{scheme=int8-block}"
    result = invoke(
        "run", recipe, "--out", "out", "--passes", pipeline, "--until", "fuse-norms",
        "--no-verify", "--dtype", "bfloat16", "--set", "generate.height=48", "--no-cache",
        "--dump-ir", "ir", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.output == ""
    manifest = read_manifest(work / "out")
    assert [record["name"] for record in manifest.history] == PASSES[:2]
    assert manifest.history[1]["options"]["adaln"] is False
    assert manifest.recipe["model"]["dtype"] == "bfloat16"
    assert manifest.recipe["generate"]["height"] == 48
    assert manifest.recipe["verify"]["mode"] == "off"
    assert (work / "ir" / "002-fuse-norms.transformer.txt").is_file()


def test_plan_reads_no_weights_and_predicts_what_run_does(compiled, recipe, monkeypatch):
    from turbo_opt.ir.files import SafetensorsFile

    done = json.loads(compiled[1].stdout)
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("a weight was read"))
    result = invoke("plan", recipe, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    for planned, ran in zip(record["passes"], done["passes"], strict=True):
        assert planned["matches"] == ran["matches"]
        assert planned["weight_bytes_after"] == ran["weight_bytes_after"]
    assert record["evaluations_per_clip"] == 4
    assert record["memory"]["run_bytes"] > record["memory"]["weights_on_device_bytes"]


def test_plan_shows_a_table_with_near_misses(recipe):
    result = invoke("plan", recipe, "--set", "passes.quantize-linear.skip={first: 1}")
    assert result.exit_code == 0, result.stderr
    assert "quantize-linear{scheme=int8-block skip={first=1}}" in result.stdout
    assert "near miss, quantize-linear: 10× skipped by the recipe" in result.stdout
    assert "4 per clip, in 2 steps" in result.stdout


def test_plan_names_the_weights_that_passes_lack(recipe, registry):
    @register_pass
    class Sparse(Pass):
        name = "sparse-standin"
        numerics = Numerics.RETRAINED
        needs_weights = ("*.proj_l.weight",)

        def run(self, program, options, context):
            raise AssertionError("must not run")

    result = invoke("plan", recipe, "--passes", "canonicalize,sparse-standin", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["passes"][1]["missing_weights"] == ["*.proj_l.weight"]
    assert "sparse-standin needs weights named *.proj_l.weight" in result.stderr


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_checkpoint_that_is_not_tuned_for_sla_is_refused_with_the_remedy(recipe, work, command):
    passes = ("--passes", "canonicalize,fuse-norms,sparse-attention")
    out = ("--out", "out", "--no-cache") if command == "run" else ()
    result = invoke(command, recipe, *passes, *out)
    assert result.exit_code == 2
    assert "sparse-attention needs weights named blocks.0.attn1.proj_l.weight" in result.stderr
    assert "it is not tuned for SLA; `proj_l: zero` runs the training-free" in result.stderr
    if command == "plan":
        assert "blocks.0.attn1.proj_l.weight" in result.stdout
    assert not list(work.iterdir())


def test_a_failing_pass_leaves_a_reproducer_and_no_artifact(recipe, work, registry):
    @register_pass
    class Broken(Pass):
        name = "broken-standin"
        numerics = Numerics.EXACT

        def run(self, program, options, context):
            raise RuntimeError("a bug in the pass")

    result = invoke(
        "run", recipe, "--out", "out", "--no-cache", "--passes", "canonicalize,broken-standin"
    )
    assert result.exit_code == 1
    assert "error: broken-standin: a bug in the pass" in result.stderr
    assert "turbo-opt reproduce out.reproducer" in result.stderr
    assert sorted(item.name for item in work.iterdir()) == ["out.reproducer"]
    again = invoke("reproduce", "out.reproducer")
    assert again.exit_code == 1
    assert "error: broken-standin: a bug in the pass" in again.stderr
    Broken.run = lambda self, program, options, context: PassResult(program)  # type: ignore[method-assign]
    Broken.may_match_nothing = True
    fixed = invoke("reproduce", "out.reproducer", "--json")
    assert fixed.exit_code == 0, fixed.stderr
    assert json.loads(fixed.stdout)["failed"] is False


def test_a_missed_budget_exits_with_3_and_reproduces_with_the_recipes_budget(recipe, work):
    result = invoke(
        "run", recipe, "--out", "out", "--no-cache", "--until", "quantize-linear",
        "--set", "verify.budgets.quantizes=90",
    )  # fmt: skip
    assert result.exit_code == 3
    assert "the budget of 'quantizes' is 90.0 dB" in result.stderr
    assert not (work / "out").exists()
    assert invoke("reproduce", "out.reproducer").exit_code == 3


def test_a_pass_that_matches_nothing_fails_unless_it_is_optional(recipe, work):
    twice = "canonicalize,fuse-norms,fuse-norms"
    result = invoke("run", recipe, "--out", "out", "--no-cache", "--passes", twice)
    assert result.exit_code == 1
    assert "fuse-norms matched nothing" in result.stderr
    assert invoke("plan", recipe, "--passes", f"{twice}?").exit_code == 0


def test_an_unexpected_failure_is_one_message_and_a_traceback_only_under_debug(recipe, monkeypatch):
    import turbo_opt.compiler.build

    def broken(*_, **__):
        raise RuntimeError("surprise")

    monkeypatch.setattr(turbo_opt.compiler.build, "capture_recipe", broken)
    result = invoke("plan", recipe)
    assert result.exit_code == 1
    assert "internal error, RuntimeError: surprise" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in invoke("--debug", "plan", recipe).stderr
