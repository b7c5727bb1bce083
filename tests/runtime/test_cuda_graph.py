"""Recording and replaying of steps, on a CPU: the device is played by a fake."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch

from tests.helpers.variants import VARIANTS, compiled, random_inputs
from tests.runtime.test_staged import optimized, velocity, whole
from turbo_opt.runtime import cuda_graph
from turbo_opt.runtime.cuda_graph import StepGraphs, Values, why_not
from turbo_opt.runtime.staged import StagedGraph

T2V = VARIANTS["t2v"]


class FakeBackend:
    """Records a callable. Like a device it computes nothing while recording, and a replay reads and
    writes what was there then."""

    def __init__(self, failure=None):
        self.log = []
        self._failure = failure

    def warm_up(self, run):
        self.log.append("warm up")
        return run()

    def record(self, run):
        self.log.append("record")
        if self._failure is not None:
            raise RuntimeError("recording ended") from self._failure
        shape = run().shape
        with torch.inference_mode(False):  # a device writes to any tensor
            result = torch.full(shape, float("nan"))

        def replay():
            self.log.append("replay")
            result.copy_(run())

        return replay, result


def recorded(name="t2v", backend=None):
    module = compiled(optimized(name, "canonicalize,hoist-invariants"))
    module._staged = StagedGraph(module.graph, module.stages, backend or FakeBackend())
    return module, module._staged.graphs


@pytest.mark.parametrize("name", VARIANTS)
def test_replays_keep_every_bit_for_prompts_timesteps_and_sizes_in_turn(name):
    backend = FakeBackend()
    module, _ = recorded(name, backend)
    for size in ((1, 2, 8, 8), (2, 1, 12, 8), (1, 2, 8, 8)):
        inputs = random_inputs(VARIANTS[name], *size)
        prompts = [inputs["encoder_hidden_states"], inputs["encoder_hidden_states"].flip(-1)]
        results = []
        for timestep in (999, 3, 999):
            inputs["timestep"] = torch.full_like(inputs["timestep"], timestep)
            inputs["hidden_states"] = inputs["hidden_states"] + 1
            for prompt in prompts:
                inputs["encoder_hidden_states"] = prompt
                results.append((velocity(module, inputs), velocity(whole(name), inputs)))
        assert all(torch.equal(found, expected) for found, expected in results)
    assert backend.log.count("warm up") == backend.log.count("record") == 2
    assert backend.log.count("replay") == 18 - 2


def test_the_first_call_warms_up_the_second_records_and_later_ones_replay():
    backend = FakeBackend()
    module, graphs = recorded(backend=backend)
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    assert graphs.status == "on, 0 shapes recorded"
    for _ in range(3):
        velocity(module, inputs)
    assert backend.log == ["warm up", "record", "replay", "replay"]
    assert graphs.status == "on, 1 shape recorded"


def test_results_are_the_callers_to_keep():
    module, _ = recorded()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    for _ in range(2):
        velocity(module, inputs)
    first = velocity(module, inputs)
    copy = first.clone()
    velocity(module, {**inputs, "hidden_states": inputs["hidden_states"] * 2})
    assert torch.equal(first, copy)


def test_a_text_of_another_length_is_another_shape():
    backend = FakeBackend()
    module, _ = recorded(backend=backend)
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    shorter = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"][:, :9].clone()}
    for given in (inputs, inputs, shorter, shorter, inputs):
        assert torch.equal(velocity(module, given), velocity(whole("t2v"), given))
    assert backend.log.count("record") == 2


def test_two_shapes_are_kept():
    backend = FakeBackend()
    step = StepGraphs(lambda x: x + 1, backend)
    inputs = [[Values({"x": torch.zeros(n)})] for n in (1, 2, 3)]
    for given in (*inputs, *inputs):
        step(given)
    assert backend.log == ["warm up"] * 6
    for given in (inputs[1], inputs[2], inputs[1], inputs[2]):
        step(given)
    assert backend.log[6:] == ["record", "replay"] * 2 + ["replay"] * 2


def test_values_in_place_are_not_copied_again(monkeypatch):
    copied = []
    copy = torch._foreach_copy_
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda to, source: (copied.append(len(to)), copy(to, source))
    )
    module, _ = recorded()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    for _ in range(2):
        velocity(module, inputs)
    copied.clear()
    velocity(module, inputs)
    assert copied == [1]  # hidden_states
    velocity(module, {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] * 2})
    assert copied == [1, 1, 4]  # keys and values of two layers


def test_buffers_do_not_keep_values_of_a_prompt_that_is_gone():
    step = StepGraphs(lambda x, y: x + y, FakeBackend())
    prompt = Values({"y": torch.ones(3)})
    for _ in range(3):
        step([Values({"x": torch.zeros(3)}), prompt])
    gone = weakref.ref(prompt)
    del prompt
    gc.collect()
    assert gone() is None
    assert torch.equal(
        step([Values({"x": torch.zeros(3)}), Values({"y": torch.full((3,), 2.0)})]),
        torch.full((3,), 2.0),
    )


def test_a_step_that_cannot_be_recorded_runs_plainly_and_the_reason_is_told_once(caplog):
    backend = FakeBackend(failure=ValueError("an operator waits for the device\nmore"))
    module, graphs = recorded(backend=backend)
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    expected = velocity(whole("t2v"), inputs)
    with caplog.at_level(logging.WARNING, "turbo_opt"):
        for _ in range(4):
            assert torch.equal(velocity(module, inputs), expected)
    assert [item.name for item in caplog.records].count("turbo_opt.runtime.cuda_graph") == 1
    assert graphs.status == (
        "failed, each step is launched anew: ValueError: an operator waits for the device"
    )
    assert backend.log == ["warm up", "record"]


def test_results_and_buffers_survive_inference_mode():
    module, _ = recorded()
    inputs = random_inputs(T2V, 1, 2, 8, 8)
    with torch.inference_mode():
        for _ in range(2):
            velocity(module, inputs)
    inputs["hidden_states"] = inputs["hidden_states"] + 1
    assert torch.equal(velocity(module, inputs), velocity(whole("t2v"), inputs))


def test_it_can_be_turned_off_by_argument_and_by_environment(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert why_not(cuda, wanted=True) is None
    assert why_not(cuda, wanted=False) == "off, cuda_graph=False"
    assert why_not(torch.device("cpu"), wanted=True) == "off, the model is on cpu"
    monkeypatch.setenv(cuda_graph.CUDA_GRAPH_VARIABLE, "0")
    assert why_not(cuda, wanted=True) == "off, TURBO_OPT_CUDA_GRAPH=0"
