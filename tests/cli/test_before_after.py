"""What a demo says of the two clips."""

from __future__ import annotations

import numpy as np
import pytest

from turbo_opt.cli.before_after import clip_text, machine, psnr, psnr_text, report_entries

RECORD = {
    "device": "cuda",
    "machine": "a GPU",
    "prompt": "a red circle",
    "seed": 3,
    "clip": "17 frames of 96×96",
    "metrics": {
        "seconds_per_clip_before": 12.0,
        "seconds_per_clip_after": 4.8,
        "speed_up": 2.5,
        "psnr_db": 41.234,
        "evaluations": {"before": 100, "after": 4},
        "detected": {
            "before": {"colour": True, "shape": True},
            "after": {"colour": True, "shape": False},
        },
    },
    "totals": {
        "weight_bytes_before": 4096,
        "weight_bytes_after": 1024,
        "end_to_end_sqnr_db": {"transformer": 36.62, "transformer_2": "Infinity"},
    },
}


def test_entries_of_a_report_have_units_and_name_before_and_after():
    entries = report_entries(RECORD)
    assert entries["metrics"] == {
        "speed-up, 12.00 s → 4.80 s per clip": "2.50×",
        "PSNR between the clips": "41.2 dB",
        "SQNR of one evaluation, transformer": "36.6 dB",
        "SQNR of one evaluation, transformer_2": "bitwise",
    }
    rows = [tuple(row.values()) for row in entries["comparison"]]
    assert rows == [
        ("network evaluations", "100", "4", "25× fewer"),
        ("time per clip", "12.00 s", "4.80 s", "2.50× as fast"),
        ("weights", "4.00 KiB", "1.00 KiB", "25% of the bytes"),
        ("shows what the prompt asks (colour, shape)", "2 of 2", "1 of 2, not shape", ""),
    ]
    assert entries["context"] == {
        "measured on": "a GPU",
        "prompt": "a red circle (seed 3)",
        "clip": "17 frames of 96×96",
    }


def test_only_a_measurement_on_a_cpu_warns_that_it_says_nothing_about_a_gpu():
    assert not any("GPU" in note for note in report_entries(RECORD)["notes"])
    assert any("GPU" in note for note in report_entries({**RECORD, "device": "cpu"})["notes"])


def test_a_prompt_that_tiny_wan_was_not_taught_has_no_row():
    detected = {"before": None, "after": None}
    record = {**RECORD, "metrics": {**RECORD["metrics"], "detected": detected}}
    assert len(report_entries(record)["comparison"]) == 3


def test_only_as_many_steps_are_said_to_be_the_same():
    assert "sampling steps" not in report_entries(RECORD)["notes"][0]
    same = {"before": 50, "after": 50}
    record = {**RECORD, "metrics": {**RECORD["metrics"], "evaluations": same}}
    assert "sampling steps" in report_entries(record)["notes"][0]
    assert report_entries(record)["comparison"][0]["change"] == ""


def test_equal_clips_are_identical_and_others_have_decibels():
    clip = np.zeros((5, 8, 16, 3), np.uint8)
    assert clip_text(clip) == "5 frames of 16×8"
    assert psnr(clip, clip) == float("inf")
    assert psnr_text("Infinity") == "identical"
    assert psnr(clip, clip + np.uint8(255)) == pytest.approx(0)
    assert psnr_text(50.0916) == "50.1 dB"


def test_a_cpu_is_named_with_its_threads():
    assert machine("cpu").endswith((" thread", " threads"))
    assert len(machine("cpu")) > len("1 threads")
