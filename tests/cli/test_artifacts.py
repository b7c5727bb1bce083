"""`generate`, `verify`, `inspect`, `diff` and `demo` on a compiled artifact."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.cli.conftest import invoke
from turbo_opt.runtime.video import read_video


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_generate_writes_a_clip_and_says_how_long_it_took(artifact, work, suffix):
    result = invoke(
        "generate", artifact, "--prompt", "a red circle", "--negative-prompt", "blue",
        "--out", f"clip{suffix}", "--device", "cpu", "--seed", 3,
        "--height", 40, "--num-frames", 9, "--fps", 4, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["frames"], record["height"], record["width"]) == (9, 40, 32)
    assert record["seconds"] > 0
    assert record["evaluations"] == 4
    assert set(record["seconds_by_stage"]) == {"text", "denoise", "decode"}
    assert "denoise: 2 steps" in result.stderr
    assert (work / f"clip{suffix}").stat().st_size > 0
    if suffix == ".mp4":
        frames, fps = read_video(work / "clip.mp4")
        assert frames.shape == (9, 40, 32, 3)
        assert fps == 4


def test_generate_prints_a_summary_that_quiet_leaves_out(artifact, work):
    arguments = ("generate", artifact, "--prompt", "a", "--out", "a.png", "--device", "cpu")
    assert "a.png: 5 frames of 32×32 in" in invoke(*arguments).stdout
    quiet = invoke("--quiet", *arguments)
    assert quiet.exit_code == 0
    assert quiet.stdout == ""
    assert "denoise" not in quiet.stderr


def test_verify_passes_an_intact_artifact(artifact):
    result = invoke("verify", artifact, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["passed"]
    assert record["replays"][0]["bitwise"]
    assert "intact" in invoke("verify", artifact, "--device", "cpu").stdout


def test_verify_finds_a_damaged_file(artifact, work):
    shutil.copytree(artifact, work / "copy")
    shard = next((work / "copy" / "denoisers").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    result = invoke("verify", "copy")
    assert result.exit_code == 2
    assert f"{shard.relative_to(work)}: damaged" in result.stderr


def test_verify_exits_with_1_when_a_replay_differs(artifact, monkeypatch):
    import turbo_opt.artifact.verify as module

    run = module.run_replay
    monkeypatch.setattr(module, "run_replay", lambda *given: run(*given) + 1)
    result = invoke("verify", artifact, "--device", "cpu", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert "another output than was stored" in result.stderr


def test_inspect_shows_networks_passes_and_operators(artifact):
    record = json.loads(invoke("inspect", artifact, "--json").stdout)
    assert record["denoisers"]["transformer"]["operators"]["turbo_opt.block_linear"] == 20
    assert [row["matches"] for row in record["passes"]]
    text = invoke("inspect", artifact).stdout
    for word in ("WanTransformer3DModel", "int8", "turbo_opt.block_linear", "quantize-linear"):
        assert word in text


def test_diff_is_0_unless_asked_for_an_exit_code(artifact, recipe, work):
    same = invoke("diff", artifact, artifact, "--exit-code")
    assert same.exit_code == 0
    assert "the same networks" in same.stdout
    made = invoke("run", recipe, "--out", "other", "--until", "fuse-norms", "--resume")
    assert made.exit_code == 0, made.stderr
    different = invoke("diff", artifact, "other")
    assert different.exit_code == 0
    assert "turbo_opt.block_linear" in different.stdout
    assert "weights removed" in different.stdout
    coded = invoke("diff", artifact, "other", "--exit-code", "--json")
    assert coded.exit_code == 1
    assert json.loads(coded.stdout)["same"] is False


def test_someone_elses_manifest_cannot_write_to_the_terminal(artifact, work):
    shutil.copytree(artifact, work / "copy")
    path = work / "copy" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["environment"]["torch"] = "\x1b[2J\x1b]0;title\x07"
    manifest["history"][0].update(name="\x1b[31m", matches="many", near_misses=[{"count": "x"}])
    path.write_text(json.dumps(manifest))
    result = invoke("inspect", "copy")
    assert result.exit_code == 0, result.stderr
    assert "\x1b" not in result.output


def test_demo_compares_before_and_after_and_runs_again(recipe, work):
    result = invoke("demo", "--recipe", recipe, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    out = work / "demo-output"
    assert {"artifact", "report.html", "report.json", "before.mp4", "after.mp4"} <= {
        item.name for item in out.iterdir()
    }
    assert json.loads((out / "report.json").read_text()) == record
    assert record["metrics"]["psnr_db"] > 20
    assert record["metrics"]["speed_up"] > 0
    assert set(record["metrics"]["detected"]["after"]) == {
        "colour",
        "shape",
        "motion",
        "background",
    }
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 12
    assert html.count("data:video/mp4;base64,") == 2
    tiles = dict(re.findall(r'class="tile"><b>(.*?)</b><span>([\w-]+)', html))
    assert list(tiles.values()) == ["speed-up", "PSNR", "SQNR", "weights"]
    for text in (str(recipe), record["machine"], "5 frames of 32×32", "says nothing about a GPU"):
        assert text in html
    assert "Before and after" in html
    assert "shows what the prompt asks (colour, shape, motion, background)" in html
    (out / "notes.txt").write_text("mine")
    again = invoke("demo", "--recipe", recipe, "--device", "cpu", "--prompt", "a dog")
    assert again.exit_code == 0, again.stderr
    assert "not a caption of tiny-wan" in again.stdout
    assert "shows what the prompt asks" not in (out / "report.html").read_text()
    assert "seconds per clip" in again.stdout
    assert (out / "notes.txt").read_text() == "mine"


def test_a_demo_with_bad_input_leaves_no_folder(refused, recipe):
    refused("demo", "--recipe", recipe.with_name("nothing.yaml"))
