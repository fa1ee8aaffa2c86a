"""Replays of decode steps: a pass is recorded once for each shape, and its recording replayed for all later passes of that shape.

A step of a 7B model is 1,053 operations, views not counted. Started one by one from Python they take longer than the GPU needs for them;
a CUDA graph starts them all at once. A graph repeats what was recorded at the same addresses, so everything that differs between two passes
of a shape has to be in tensors that stay where they are: the staged words, copied into a buffer of the shape's own, and the cache.

    shape (8 rows, 1 token, 512 columns)   first pass      computed: libraries choose kernels, and load them
                                           second pass     recorded, then replayed
                                           all later ones  words copied, recording replayed

Few shapes are recorded: rows are rounded up (`round_rows`), and tokens (`WIDTHS`) and columns of the cache as well.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)
WIDTHS = (1, 2, 4, 8, 16)
"""Tokens of a row that a replayed pass takes."""
MOST_TOKENS = 256
"""Rows x tokens of a replayed pass. Logits are computed for all of them: 156 MB in float32 for a vocabulary of 152,064."""
MOST_RECORDINGS = 32
"""The recording that was not replayed for the longest time is dropped for another. All share the memory of a pass; what each takes besides
is to be measured."""
CAPTURE_BYTES = 2**30
"""Memory that a capture should find free: more than the logits of 256 tokens and what is computed from them."""

Computation = Callable[[Tensor], Tensor]
"""Computes a pass from its staged words on the device; only reads them, and writes nothing but the cache."""
Recorder = Callable[[Computation, Tensor], tuple[Callable[[], object], Tensor]]
"""Records a computation on these words; returns what replays it, and the tensor in which each replay leaves the result."""


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """The recording of one shape of pass, and the tensors through which it takes and returns numbers."""

    words: Tensor
    result: Tensor
    replay: Callable[[], object]


class PassReplays:
    """The recordings of one batch."""

    def __init__(self, make_recorder: Callable[[], Recorder] | None) -> None:
        """`make_recorder` is called at the beginning and whenever all recordings were dropped; None for no recordings."""
        self._make_recorder = make_recorder
        self._recorder: Recorder | None = None
        self._recorded: dict[Hashable, RecordedPass] = {}
        """The one replayed last stands last."""
        self._seen: set[Hashable] = set()
        self._generation = -1
        self.is_on = make_recorder is not None
        """Whether passes are replayed. Set to False once recording has failed."""
        self.recordings, self.replays = 0, 0
        """How many passes were recorded and replayed so far."""

    def run(self, shape: Hashable, words: Tensor, device: torch.device, generation: int, compute: Computation) -> Tensor:
        """Return what `compute` returns for staged words on the CPU, by a replay from the second pass of a shape on.

        `generation` is that of the cache (`KeyValueCache.generation`). The result is overwritten by the next pass of this shape.
        """
        if generation != self._generation:
            self.drop_recordings()
            self._generation = generation
        recorded = self._recorded.pop(shape, None)
        if recorded is not None:
            recorded.words.copy_(words, non_blocking=True)
        elif shape in self._seen and self.is_on:
            recorded = self._record(words.to(device, non_blocking=True), compute)
        if recorded is None:
            self._seen.add(shape)
            return compute(words.to(device, non_blocking=True))
        self._recorded[shape] = recorded
        recorded.replay()
        self.replays += 1
        return recorded.result

    def drop_recordings(self) -> None:
        """Drop all recordings and the memory that they share."""
        self._recorded.clear()
        self._recorder = None

    def _record(self, words: Tensor, compute: Computation) -> RecordedPass | None:
        """Return the recording of a pass. If it fails, for want of memory for example, return None and record no more."""
        assert self._make_recorder is not None
        try:
            if len(self._recorded) >= MOST_RECORDINGS:
                del self._recorded[next(iter(self._recorded))]
            self._recorder = self._recorder or self._make_recorder()
            replay, result = self._recorder(compute, words)
        except Exception as error:  # any: what really is wrong with the pass is raised again when it is computed
            self.drop_recordings()
            self.is_on = False
            LOG.warning("CUDA graphs: a step cannot be captured, all are computed from here on, which is slower: %s", error)
            return None
        self.recordings += 1
        return RecordedPass(words, result, replay)


def make_replays(device: torch.device, is_eager: bool) -> PassReplays:
    """Return the replays of an engine: by CUDA graphs on a GPU, none on a CPU or where `is_eager` forbids them."""
    return PassReplays(make_graph_recorder if device.type == "cuda" and not is_eager else None)


def make_graph_recorder() -> Recorder:
    """Return a recorder of CUDA graphs that share one pool of memory: they are replayed one after another, and each result is read at once.

    torch's documentation says of such pools that replays must not overlap; the passes of one engine do not.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Computation, words: Tensor) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Not torch.cuda.graph(): that returns all memory that torch keeps to the driver first, and the next prompt would have to fetch it
        # again. Memory kept for other passes cannot be had during a capture, so it is returned where little else is left.
        if torch.cuda.mem_get_info()[0] < CAPTURE_BYTES:
            torch.cuda.empty_cache()
        with pause_garbage_collection():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads of this process may do as they like
            try:
                result = compute(words)
            finally:
                graph.capture_end()
        return graph.replay, result

    return record


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: events and graphs of the device that are destroyed during a capture make it fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def open_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream of one's own: the default one cannot be captured, and memory and libraries' workspaces belong to a stream."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)  # the weights were copied on the default stream
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def round_rows(count: int) -> int:
    """Return for how many rows a pass over `count` rows is recorded: 1, 2, 4, 8, 16, 24, …"""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
