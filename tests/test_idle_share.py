"""What `benchmarks.idle_share` calls idle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.forward import CASES
from benchmarks.idle_share import idle_share, run, run_loop_graph, work_intervals
from benchmarks.kernels._harness import Session


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([(0, 10)], 0),
        ([(0, 4), (6, 10)], 0.2),
        ([(6, 10), (0, 4)], 0.2),
        ([(0, 6), (4, 10)], 0),
        ([(0, 10), (2, 3), (5, 6)], 0),
        ([(100, 101), (103, 104), (101, 102)], 0.25),
    ],
)
def test_idle_is_what_no_interval_covers(intervals, share):
    assert idle_share(intervals) == pytest.approx(share)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=30))
def test_it_equals_a_count_of_uncovered_units(found):
    intervals = [(start, start + length) for start, length in found]
    units = {unit for start, end in intervals for unit in range(start, end)}
    span = max(units) + 1 - min(units)
    assert idle_share(intervals) == pytest.approx(1 - len(units) / span)


@pytest.mark.parametrize("intervals", [[], [(5, 5)]])
def test_nothing_recorded_is_an_error(intervals):
    with pytest.raises(ValueError, match="no interval of any length"):
        idle_share(intervals)


def test_the_profiler_gives_intervals_that_cover_the_work():
    x = torch.randn(400, 400)
    intervals = work_intervals(lambda: x @ x, torch.device("cpu"))
    assert intervals and 0 <= idle_share(intervals) < 0.5


def test_a_configuration_stands_beside_diffusers_model_in_the_same_run():
    record = run(CASES["tiny"], Session(dry=True), "fused-fp8")
    assert record.name == "dry/tiny-random/gpu_idle_share"
    assert 0 <= record.value < 1 and record.runs == 5
    assert (
        set(record.baseline) == {"diffusers-eager"} and 0 <= record.baseline["diffusers-eager"] < 1
    )
    eager = record.config["diffusers-eager"]
    assert eager["four_steps_ms_without_profiler"] > 0 and eager["kernels_and_copies"] > 0


def test_a_loop_is_timed_beside_its_steps_and_the_record_says_whether_it_was_one():
    record = run_loop_graph(CASES["tiny"], Session(dry=True), "fused-fp8")
    assert record.name == "dry/tiny-random/loop_graph"
    assert record.value > 0 and set(record.baseline) == {"step_graphs"}
    assert record.config["loop_graph_status"] == "off, the model is on cpu"
