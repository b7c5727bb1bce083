"""README's tables: what they say of records that are missing, missed, or not for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.results import Ceiling, Record, write
from benchmarks.tables import TABLES, cells, filled
from benchmarks.tables.cells import number
from benchmarks.targets import FILE, derived


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    return tmp_path


def record(name: str, value: float, unit: str = "ms", **facts) -> Record:
    return Record(name, value, unit, 0.1, 5, commit="0123456789abcdef", **facts)


def rows(table: str) -> list[list[str]]:
    """The cells of each line but the two of the head; each line must have as many as the head."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1, table
    return [[cell.strip() for cell in line] for line in lines[2:]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0054662, "0.005466"), (10.034, "10.03"), (2508.1, "2,508"), (999.4, "999.4"), (0, "0")],
)
def test_a_number_has_four_digits_that_count(value, text):
    assert number(value) == text


def test_a_target_without_a_record_is_missed(results):
    found = {row[0]: row[3:5] for row in rows(tables.targets())}
    assert len(found) == 12
    *headlines, copies = found.values()
    assert all(cells == ["not recorded", "**missed**"] for cells in headlines)
    assert copies == ["0 of 0 reach it", "**missed**"]


def test_a_target_says_whether_it_is_reached_and_what_it_is_of(results):
    ceiling = Ceiling(0.6, "ms", "its products")
    write(
        results / FILE,
        derived(
            [
                record("h200/sagesla/12x32760_ms", 1.2, ceiling=ceiling, baseline={"sdpa": 11.6}),
                record("h200/sagesla/triton/40x75600_ms", 20.8),
                record("h200/adaln/8x4/cuda/share_of_copy", 0.9169, ""),
                record("h200/rms_norm/8x4/cuda/share_of_copy", 0.5, ""),
            ]
        ),
    )
    found = {row[0]: row[1:] for row in rows(tables.targets())}
    assert found["`sagesla/12x32760_ms`"] == [
        "≤ 1.5", "≤ 1.15", "1.2 ms", "must reached", "floor 0.6, sdpa 11.6", "0123456",
    ]  # fmt: skip
    assert found["`sagesla/40x75600_ms`"][2:] == [
        "20.8 ms", "**missed**", "", "`sagesla/triton/40x75600_ms`, 0123456",
    ]  # fmt: skip
    copies = found["`<memory-bound kernel>/share_of_copy`"]
    assert copies[2:4] == ["1 of 2 reach it", "**missed**"]
    shares = [[row[0], *row[-2:]] for row in rows(tables.shares())]
    assert shares == [
        ["`adaln`", "0.917", "must reached"],
        ["`rms_norm`", "0.500", "**missed**"],
    ]


def test_attention_that_was_not_measured_is_not_passed_over_in_silence(results):
    dense = {"sdpa_dense_bf16": 11.6}
    write(results / "kernels.json", [record("h200/sagesla/12x32760_ms", 1.2, baseline=dense)])
    first, *_, last = rows(tables.attention())
    assert first[1:] == ["1.2 ms", "", "not recorded", ""]
    assert last[1:] == ["11.6 ms", "", "not recorded", ""]


def test_training_has_a_row_for_each_number_of_gpus(results):
    def speed(job: str, gpus: int, value: float, together: int, **said) -> Record:
        facts = {"peak_gib": 35.64, "job": {"context_parallel": together, **said}}
        name = f"h200/wan2.1-t2v-1.3b-480p/{job}/{gpus}-gpus/tokens_per_s"
        return record(name, value, "tokens/s", share_of_ceiling=0.339, config=facts)

    records = [
        speed("calibrate-sla", 8, 60_000, 4),
        speed("calibrate-sla", 1, 12_774.2, 1),
        record("h200/wan2.1-t2v-1.3b-480p/calibrate-sla/1-gpus/seconds", 2.5, "s"),
        replace(speed("calibrate-sla", 2, 9_000, 2, compile=False), runs=1),
        speed("calibrate-sla-compiled", 1, 20_000, 1, compile=True),
        speed("calibrate-sla-compiled-2-a-clip", 4, 70_000, 2, compile=True),
        speed("calibrate-rcm-jvp", 1, 4_000, 1),
        speed("calibrate-rcm-dense-compiled", 1, 6_000, 1, compile=True),
        record("h200/tiny-wan/calibrate-sla/resumed_loss_difference", 1e-7, "relative"),
    ]
    write(results / "training.json", records)
    common = ["0.34", "35.6 GiB"]
    assert [row[1:] for row in rows(tables.training())] == [
        ["`calibrate rcm`, dense", "compiled", "1", "1", "6,000 ± 0", *common],
        ["`calibrate rcm`, dense, forward mode", "as written", "1", "1", "4,000 ± 0", *common],
        ["`calibrate sla`", "as written", "1", "1", "12,774 ± 0", *common],
        ["`calibrate sla`", "as written", "2", "2", "9,000, one reading", *common],
        ["`calibrate sla`", "as written", "8", "4", "60,000 ± 0", *common],
        ["`calibrate sla`", "compiled", "1", "1", "20,000 ± 0", *common],
        ["`calibrate sla`", "compiled", "4", "2", "70,000 ± 0", *common],
    ]


def test_a_cold_start_has_its_parts(results):
    step = {"start_s": 3.19, "load_s": 11.96, "step_s": 5.27}
    clip = {**step, "text_s": 4.0, "steps_s": 0.41, "decode_s": 6.0}
    name = "h200/wan2.1-t2v-1.3b-480p/{}_caches_s"
    records = [
        record(name.format("cold_start_empty"), 20.4, "s", config=step),
        record(name.format("first_clip_warm"), 30.8, "s", config=clip),
    ]
    write(results / "cold_start.json", records)
    assert [row[1:] for row in rows(tables.cold_start())] == [
        ["none yet", "3.2 s", "12.0 s", "", "5.3 s", "", "", "20.4 ± 0.1 s"],
        [
            *("of an earlier process", "3.2 s", "12.0 s", "4.0 s"),
            *("5.3 s", "0.4 s", "6.0 s", "30.8 ± 0.1 s"),
        ],
    ]


def student(weights: str, steps: int, value: float, **config) -> Record:
    plain = {"topk": None, "scheme": None, "guided": False, "tuned": True, "student": "rcm"}
    config = {**plain, "weights": weights, "steps": steps, "evaluations": steps, **config}
    name = "/".join(str(part) for part in config.values())
    return record(f"h200/tiny-wan/students/{name}", value, "share", config=config)


def test_students_stand_behind_their_teacher_and_only_those_that_are_tuned(results):
    records = [
        student("merged", 4, 0.98, topk=0.2),
        student("merged", 4, 0.97, topk=0.1),
        student("merged", 4, 0.01, topk=0.2, tuned=False),
        student("rcm", 1, 0.94),
        student("rcm", 4, 0.996),
        student("student", 4, 0.995, scheme="int8-block"),
        student("student", 4, 0.98, scheme="int8-block", student="consistency"),
        student("consistency", 4, 0.98),
        student("teacher", 50, 0.994, guided=True, evaluations=100),
        student("teacher", 4, 0.5),
        student("teacher", 50, 0.0, guided=True, evaluations=100, topk=0.1),
    ]
    write(results / "tiny_wan_students.json", records)
    found = [row[1:] for row in rows(tables.students())]
    assert found == [
        ["100", "dense", "16 bits", "99.4 %"],
        ["4", "dense", "16 bits", "99.6 %"],
        ["4", "dense", "int8-block", "99.5 %"],
        ["1", "dense", "16 bits", "94.0 %"],
        ["4", "sparse, topk 0.1", "16 bits", "97.0 %"],
        ["4", "sparse, topk 0.2", "16 bits", "98.0 %"],
    ]


def test_a_forward_shows_its_floor_where_it_has_one(results):
    config = {"weight_gib": 1.4, "peak_gib": 1.8}
    name = "h200/wan2.1-t2v-1.3b-480p/{}/{}"
    records = [
        record(
            name.format("sagesla-fp8", "forward_ms"), 132.9,
            ceiling=Ceiling(96.2, "ms", "what it computes"), config=config,
        ),
        record(name.format("sla-bf16", "forward_ms"), 317.4, config=config),
        record(
            name.format("sagesla-fp8", "four_steps_ms"), 541.0,
            baseline={"diffusers-eager": 62_000}, config=config,
        ),
    ]  # fmt: skip
    write(results / "forward.json", records)
    floors = {row[1]: row[2] for row in rows(tables.forward().split("**14B")[0])}
    assert floors == {"317 ± 0": "", "133 ± 0": "96"}
    ((_, original, compiled, _, factor, _),) = rows(tables.clips())
    assert (original, compiled, factor) == ("62.0 s", "", "115×")


def test_only_what_stands_between_markers_is_written():
    text = "before\n<!-- table: students -->\nold\n<!-- end -->\nafter <!-- table: x -->"
    made = filled(text)
    assert made.startswith("before\n<!-- table: students -->\n| weights |")
    assert made.endswith("\n<!-- end -->\nafter <!-- table: x -->") and "old" not in made


def test_every_table_has_lines_of_one_width():
    for name, make in TABLES.items():
        for part in make().split("\n\n"):
            if part.startswith("|"):
                assert rows(part), name
