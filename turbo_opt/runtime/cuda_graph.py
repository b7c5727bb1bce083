"""A step of a denoiser, or a whole clip, as a CUDA graph: recorded once, replayed by one launch.

A replay reads and writes the addresses of its recording, so the inputs are copied into buffers of
its own first. What a replay repeats are the kernels that were chosen when it was recorded.
"""

from __future__ import annotations

import gc
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Step = Callable[..., Tensor]
"""Takes tensors and sizes by name, gives the velocity."""
Work = Callable[[Sequence[Mapping[str, Any]]], Tensor]
"""Takes the values of each source by name."""
Key = tuple[Hashable, ...]

CUDA_GRAPH_VARIABLE = "TURBO_OPT_CUDA_GRAPH"
"""`0` turns CUDA graphs off for all models."""
_MOST_SHAPES = 2
_log = logging.getLogger(__name__)


class Values:
    """Named tensors and sizes that belong together, such as what one stage gave.

    Attributes:
        signature: names, shapes and dtypes of the tensors, and the sizes themselves: what a
            recording holds fixed.
    """

    def __init__(self, by_name: Mapping[str, Any]) -> None:
        self.by_name = by_name
        self.tensors = {name: v for name, v in by_name.items() if isinstance(v, Tensor)}
        self.signature = tuple(
            (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, value)
            for name, value in by_name.items()
        )


def merged(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """All values by name."""
    return {name: value for source in sources for name, value in source.items()}


class Backend(Protocol):
    """How a device records work. `CudaBackend` is the real one."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Run once as it will be recorded; kernels are compiled, chosen and tuned here."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, the tensor that holds the result after a replay); nothing is computed yet."""


class CudaBackend:
    """CUDA graphs of one device; all of one backend share their memory, so one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                result = run()
            current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: only calls of this one could spoil the recording.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        on_device = torch.cuda.device(self._device)
        try:
            with _no_collection(), _own_randomness(self._device), on_device, recording:
                result = run()
        except BaseException:
            # torch leaves the allocator believing that this graph is being recorded into the pool,
            # and refuses to record another into it; it keeps a pointer to the graph.
            self._failed.append(graph)
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay, result


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not within: a graph that is freed while one is recorded spoils it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Give the device's generator a new state, equal to the old, if recording fails.

    The old one is left believing that it is being recorded, and refuses to draw from then on.
    """
    generator = torch.cuda.default_generators[_index(device)]
    seed, offset = generator.initial_seed(), generator.get_offset()
    try:
        yield
    except BaseException:
        fresh = torch.Generator(device)
        fresh.manual_seed(seed)
        fresh.set_offset(offset)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def why_not(device: torch.device, wanted: bool) -> str | None:
    """Why steps are not recorded on `device`, in a clause; None if they are.

    Args:
        wanted: what the caller said.
    """
    if not wanted:
        return "off, cuda_graph=False"
    if os.environ.get(CUDA_GRAPH_VARIABLE) == "0":
        return f"off, {CUDA_GRAPH_VARIABLE}=0"
    return None if device.type == "cuda" else f"off, the model is on {device.type}"


class Recordings:
    """Work that one backend recorded, by key: a key's work is recorded when it is met again.

    The two keys used last are kept. Where recording fails, nothing is recorded from then on.

    Args:
        of: what one recording holds, in a word for people to read.
        otherwise: what happens where recording fails, in a clause.

    Attributes:
        failure: why recording failed, in one line; None if it did not.
    """

    def __init__(self, backend: Backend, of: str, otherwise: str) -> None:
        self.failure: str | None = None
        self._backend = backend
        self._of, self._otherwise = of, otherwise
        self._by_key: OrderedDict[Key, Recording | None] = OrderedDict()

    @property
    def status(self) -> str:
        """What it does now, in one line for people to read."""
        if self.failure is not None:
            return f"failed, {self._otherwise}: {self.failure}"
        recorded = sum(item is not None for item in self._by_key.values())
        return f"on, {recorded} {self._of}{'' if recorded == 1 else 's'} recorded"

    def __contains__(self, key: Key) -> bool:
        return key in self._by_key

    def seen(self, key: Key) -> None:
        """Work of this key ran, so its kernels are compiled: it can be recorded next time."""
        if self.failure is None:
            self._keep(key, None)

    def find(self, key: Key, sources: Sequence[Values], work: Work) -> Recording | None:
        """The recording, made now if the key was seen; None if it was not or recording failed."""
        if key not in self._by_key:
            return None
        recording = self._by_key[key] or self._record(sources, work)
        if recording is not None:
            self._keep(key, recording)
        return recording

    def _record(self, sources: Sequence[Values], work: Work) -> Recording | None:
        try:
            return Recording(work, sources, self._backend)
        except Exception as error:
            self.failure = _first_cause(error)
            self._by_key.clear()
            _log.warning("CUDA graph not recorded, %s: %s", self._otherwise, self.failure)
            return None

    def _keep(self, key: Key, recording: Recording | None) -> None:
        self._by_key[key] = recording
        self._by_key.move_to_end(key)
        while len(self._by_key) > _MOST_SHAPES:
            self._by_key.popitem(last=False)


class Recording:
    """Recorded work, and the buffers that it reads."""

    def __init__(self, work: Work, sources: Sequence[Values], backend: Backend) -> None:
        self._buffers = [_Buffers(source) for source in sources]
        values = [
            {**source.by_name, **buffers.tensors}
            for source, buffers in zip(sources, self._buffers, strict=True)
        ]
        self._replay, self._result = backend.record(lambda: work(values))

    def replay(self, sources: Sequence[Values]) -> Tensor:
        """The work's result for values of the same signatures; the caller's to keep."""
        for buffers, source in zip(self._buffers, sources, strict=True):
            buffers.fill(source)
        self._replay()
        return self._result.clone()


class StepGraphs:
    """Runs a step: plainly on the first call for a shape, recorded on the second, then replayed.

    Where recording fails, every call runs plainly, and `status` says why. One call at a time.

    Attributes:
        backend: records the steps.
        failure: why recording failed, in one line; None if it did not.
    """

    def __init__(self, step: Step, backend: Backend) -> None:
        self.backend = backend
        self._step = step
        self._recordings = Recordings(backend, "shape", "each step is launched anew")

    @property
    def failure(self) -> str | None:
        return self._recordings.failure

    @property
    def status(self) -> str:
        """What it does now, in one line for people to read."""
        return self._recordings.status

    def __call__(self, sources: Sequence[Values]) -> Tensor:
        """The step's result for the values of all `sources`; the caller's to keep.

        Raises:
            Exception: what the step itself raises.
        """

        def work(values: Sequence[Mapping[str, Any]]) -> Tensor:
            return self._step(**merged(values))

        def run() -> Tensor:
            return work([source.by_name for source in sources])

        key = tuple(source.signature for source in sources)
        recording = self._recordings.find(key, sources, work)
        if recording is not None:
            return recording.replay(sources)
        if self.failure is not None:
            return run()
        result = self.backend.warm_up(run)
        self._recordings.seen(key)
        return result


class _Buffers:
    """Tensors at fixed addresses that hold the values of one source."""

    def __init__(self, source: Values) -> None:
        with torch.inference_mode(False):  # or they could not be filled outside of it
            self.tensors = {name: torch.empty_like(v) for name, v in source.tensors.items()}
        self._holds: Callable[[], Values | None] = lambda: None
        self.fill(source)

    def fill(self, source: Values) -> None:
        """Copy the values in, unless they are here already."""
        if self._holds() is source or not self.tensors:
            return
        torch._foreach_copy_(list(self.tensors.values()), list(source.tensors.values()))
        self._holds = weakref.ref(source)


def _first_cause(error: BaseException) -> str:
    """The error that the others followed from, in one line."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
