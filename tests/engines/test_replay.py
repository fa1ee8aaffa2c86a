"""Replays of decode steps on a CPU: recorded once for each shape, replayed for all later steps, and compared with computing each.

The recorder (`tests/support/recording.py`) stands for a CUDA graph: whatever a step took from Python would be that of another step. What a
GPU does is not shown here; what graphs need of the steps is.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.demo import quantize
from pipeline.engines import transformers as engine_module
from pipeline.engines.transformers import TransformersEngine, replay
from pipeline.engines.transformers.batch import PASS_COST_TOKENS, Batch, BatchRow, PassShape, lay_out_arrays
from pipeline.engines.transformers.cache import COLUMN_STEP
from pipeline.engines.transformers.generate import LoadedModel, run_step
from pipeline.engines.transformers.replay import MOST_RECORDINGS, PassReplays, make_graph_recorder, make_replays, round_rows
from pipeline.errors import DocumentError
from pipeline.records import Completion, Request, Sampling
from pipeline.schema import prompt
from tests.engines.test_families import add_adapter
from tests.support import tiny_checkpoint
from tests.support.recording import OperationRecorder, make_operation_recorder
from tests.support.requests import FLAT, make_noise
from tests.support.tiny_checkpoint import FAMILIES

ROOT = Path(__file__).parents[2]
INVOICE = (ROOT / "schemas" / "invoice.json").read_text()
CPU = torch.device("cpu")
ROUNDING = 1e-4
"""Padding a batch changes the sizes of matrix products, and with them the last bits."""

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 reads it


class ComparedReplays(PassReplays):
    """Computes each pass after it was replayed, and compares numbers and the whole cache bit for bit."""

    def __init__(self) -> None:
        super().__init__(self.make_recorder)
        self.batch: Batch | None = None
        self.recorders: list[tuple[OperationRecorder, set[int]]] = []
        self.compared, self.shapes = 0, Counter[Any]()

    def make_recorder(self) -> Any:
        record = make_operation_recorder()

        def note(compute: Any, words: Tensor) -> Any:
            again, result = record(compute, words)
            (seen,) = (cell.cell_contents for cell in again.__closure__ or () if isinstance(cell.cell_contents, OperationRecorder))
            self.recorders.append((seen, {tensor.untyped_storage().data_ptr() for tensor in seen.list_outside()}))
            return again, result

        return note

    def run(self, shape: Any, words: Tensor, device: torch.device, generation: int, compute: Any) -> Tensor:
        before, given = self.replays, words.clone()
        result = super().run(shape, words, device, generation, compute)
        self.shapes[shape] += 1
        if self.replays > before:
            found, cache = result.clone(), [buffer.clone() for buffer in self.list_buffers()]
            assert torch.equal(compute(given), found)
            assert all(torch.equal(one, other) for one, other in zip(self.list_buffers(), cache, strict=True))
            self.compared += 1
        return result

    def list_buffers(self) -> list[Tensor]:
        """Return the cache's buffers; reading prompts is not replayed, so they are all there is."""
        assert self.batch is not None
        return [getattr(layer, name) for layer in self.batch.cache.layers for name in ("keys", "values")]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[ComparedReplays]:
    """The replays of every engine that is started from here on; forced tokens are fed along as on a GPU."""
    made: list[ComparedReplays] = []

    def make(*_: Any) -> ComparedReplays:
        made.append(ComparedReplays())
        return made[-1]

    def make_batch(cache: Any, part_tokens: int, replays: ComparedReplays) -> Batch:
        replays.batch = Batch(cache, part_tokens, replays)
        return replays.batch

    monkeypatch.setitem(PASS_COST_TOKENS, "cpu", PASS_COST_TOKENS["cuda"])
    monkeypatch.setattr(engine_module, "make_replays", make)
    monkeypatch.setattr(engine_module, "Batch", make_batch)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[LoadedModel]:
    engine = TransformersEngine(str(folder), threads=1)
    yield engine._model
    engine.close()


def make_request(key: int, schema: str = FLAT, cell_px: int = 28, pages: int = 1, **sampling: Any) -> Request:
    images = [make_noise(key + at, cell_px * (2 + key % 3), cell_px * 3) for at in range(pages)]
    return Request(str(key), prompt.build_messages(f"System {key}.", images), schema, Sampling(**{"max_tokens": 120, **sampling}))


def make_mixed_requests(cell_px: int = 28, longest: int = 150) -> list[Request]:
    """Return requests with several grammars, lengths and prompts, drawn with seeds and without, some of them with a penalty."""
    return [
        make_request(
            key, (INVOICE, "", FLAT)[key % 3], cell_px, 1 + key % 2, temperature=key % 2, seed=key, top_p=0.9, top_k=40,
            repetition_penalty=1.3 if key % 4 == 3 else 1.0, max_tokens=longest - 10 * key,
        )
        for key in range(10)
    ]  # fmt: skip


def answer_all(folder: Path, requests: Sequence[Request], **settings: Any) -> list[Completion]:
    """Return the answers of an engine that is started for them, half of which are asked when the others are under way."""
    engine = TransformersEngine(str(folder), **{"threads": 1, "batch_size": 6, **settings})

    async def ask() -> list[Completion]:
        early = [asyncio.ensure_future(engine.complete(request)) for request in requests[::2]]
        while not engine._active:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        late = [asyncio.ensure_future(engine.complete(request)) for request in requests[1::2]]
        answers = dict(zip(requests[::2], await asyncio.gather(*early), strict=True))
        answers |= dict(zip(requests[1::2], await asyncio.gather(*late), strict=True))
        return [answers[request] for request in requests]

    try:
        return asyncio.run(ask())
    finally:
        engine.close()


def check_alike(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.finish_reason, one.usage) == (other.text, other.finish_reason, other.usage)
        assert [token.logprob for token in one.tokens] == pytest.approx([token.logprob for token in other.tokens], abs=ROUNDING)
        assert [token.margin is None for token in one.tokens] == [token.margin is None for token in other.tokens]
        margins = [[token.margin for token in answer.tokens if token.margin is not None] for answer in (one, other)]
        assert margins[0] == pytest.approx(margins[1], abs=ROUNDING)


# Answers


def test_replayed_answers_are_those_computed(folder: Path, replays: list[ComparedReplays], monkeypatch: pytest.MonkeyPatch) -> None:
    """`ComparedReplays` holds each replay against computing it, bit for bit; the answers are held against those of an engine without."""
    requests = make_mixed_requests(longest=260)
    found = answer_all(folder, requests)
    monkeypatch.setattr(engine_module, "make_replays", make_replays)
    monkeypatch.setattr(engine_module, "Batch", Batch)
    check_alike(found, answer_all(folder, requests))
    assert replays[0].compared == replays[0].replays > 100
    used = [shape for shape, count in replays[0].shapes.items() if count > 2]
    assert True in {shape.is_drawing for shape in used}
    assert len({shape.width for shape in used}) > 1
    assert len({shape.rows for shape in used}) > 1
    assert {shape.columns for shape in used} >= {COLUMN_STEP, 2 * COLUMN_STEP}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_replayed(family: str, tmp_path: Path, replays: list[ComparedReplays], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint.build_checkpoint(tmp_path, family=family)
    requests = make_mixed_requests(FAMILIES[family], 110)
    found = answer_all(folder, requests)
    monkeypatch.setattr(engine_module, "make_replays", make_replays)
    monkeypatch.setattr(engine_module, "Batch", Batch)
    check_alike(found, answer_all(folder, requests))
    assert replays[0].compared > 40


@pytest.mark.parametrize("family", FAMILIES)
def test_stretched_contexts_can_be_replayed(family: str, tmp_path: Path, replays: list[ComparedReplays]) -> None:
    folder = tiny_checkpoint.build_checkpoint(tmp_path, family=family)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    answer_all(folder, [make_request(key, "", FAMILIES[family], max_tokens=60) for key in range(4)], rope_scaling=yarn)
    assert replays[0].compared > 40


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_a_merged_adapter_can_be_replayed(folder: Path, tmp_path: Path, replays: list[ComparedReplays]) -> None:
    answer_all(folder, [make_request(key) for key in range(4)], lora=add_adapter(folder, tmp_path / "adapter"))
    assert replays[0].compared > 10


def test_unpacked_awq_weights_can_be_replayed(folder: Path, tmp_path: Path, replays: list[ComparedReplays]) -> None:
    quantize.quantize_checkpoint(folder, tmp_path)
    answer_all(tmp_path, [make_request(key) for key in range(4)])
    assert replays[0].compared > 10


def test_prompts_that_are_read_in_parts_beside_replays_stay_whole(folder: Path, replays: list[ComparedReplays]) -> None:
    """Rows that are padding write behind the tokens of rows that are reading: their answers would show it."""
    requests = [make_request(key, "", pages=1 if key % 2 == 0 else 9, max_tokens=60) for key in range(8)]
    found = answer_all(folder, requests, part_tokens=16, batch_size=8)
    assert any(shape.rows == 8 for shape in replays[0].shapes)
    engine = TransformersEngine(str(folder), threads=1)
    for request, answer in zip(requests, found, strict=True):
        assert answer.text == asyncio.run(engine.complete(request)).text
    engine.close()


# What is recorded


def start_rows(model: LoadedModel, batch: Batch, lengths: Sequence[int]) -> None:
    """Have rows join whose answers have these lengths, and read their prompts."""
    for key, length in enumerate(lengths):
        request = make_request(key, "", max_tokens=length)
        batch.add([BatchRow(model.encoder.encode(request.messages), request.sampling, model.vocabulary.start_constraint(""), length)])
    run_step(model, batch, range(len(lengths)))


def write_answers(model: LoadedModel, batch: Batch) -> int:
    """Run steps until all rows have ended; return how many."""
    steps = 0
    while batch.rows:
        run_step(model, batch, batch.answering)
        batch.remove([row for row in batch.rows if row.is_finished])
        steps += 1
    return steps


def test_a_recording_reads_and_writes_nothing_that_moves(model: LoadedModel) -> None:
    """All tensors that it takes from outside are weights, the cache, and words that stay where they are, as its result does."""
    made = ComparedReplays()
    batch = made.batch = Batch(model.make_cache(), 1024, made)
    start_rows(model, batch, [90] * 4)
    places = set()
    for _ in range(12):
        run_step(model, batch, range(4))
        places |= {(kept.words.data_ptr(), kept.result.data_ptr()) for kept in made._recorded.values()}
    ((words, _),) = places
    ((_, outside),) = made.recorders
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.network.parameters(), *model.network.buffers()]}
    cache = {buffer.untyped_storage().data_ptr() for buffer in made.list_buffers()}
    assert cache | {words} <= outside <= cache | {words} | weights
    assert made.compared == 11


def test_few_shapes_are_recorded_however_long_the_answers_are(model: LoadedModel) -> None:
    """Eight answers of 20 to 160 tokens without forced ones: rows of 8, 4, 2 and 1, in one or two sizes of the cache."""
    made = PassReplays(make_operation_recorder)
    batch = Batch(model.make_cache(), 1024, made)
    start_rows(model, batch, range(20, 180, 20))
    steps = write_answers(model, batch)
    assert steps == 159
    assert 4 <= made.recordings <= 8
    assert steps - made.replays <= 2 * made.recordings


def test_a_cache_that_moves_is_recorded_again_at_once(model: LoadedModel) -> None:
    made = PassReplays(make_operation_recorder)
    batch = Batch(model.make_cache(), 1024, made)
    start_rows(model, batch, [90] * 4)
    for _ in range(5):
        run_step(model, batch, range(4))
    assert (made.recordings, made.replays) == (1, 4)
    batch.cache.reserve(9, 10)
    run_step(model, batch, range(4))
    assert (made.recordings, made.replays, len(made._recorded)) == (2, 5, 1)


def test_a_batch_that_ends_leaves_its_recordings_to_the_next(model: LoadedModel) -> None:
    made = PassReplays(make_operation_recorder)
    batch = Batch(model.make_cache(), 1024, made)
    for _ in range(2):
        start_rows(model, batch, [30] * 4)
        write_answers(model, batch)
    assert (made.recordings, made.replays) == (1, 28 + 29)
    plain = Batch(model.make_cache(), 1024)
    start_rows(model, plain, [2])
    write_answers(model, plain)
    assert plain.cache.shape == (0, 0)


def test_recordings_beyond_the_limit_replace_those_not_used() -> None:
    made = PassReplays(make_operation_recorder)
    words = torch.arange(4, dtype=torch.int32)
    for shape in [*range(MOST_RECORDINGS + 1), 1]:
        for _ in range(3):
            assert torch.equal(made.run(shape, words, CPU, 0, lambda given: given * 2), words * 2)
    assert len(made._recorded) == MOST_RECORDINGS
    assert (0 in made._recorded, 1 in made._recorded) == (False, True)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24), (64, 64), (65, 72)])
def test_rows_are_rounded_up(count: int, rows: int) -> None:
    assert round_rows(count) == rows


def test_the_words_of_a_shape_have_one_layout() -> None:
    shape = PassShape(0, 8, 2, 256, 8, False, True, True, 192)
    arrays, count = lay_out_arrays(shape)
    assert [part.start for part, _, _ in arrays.values()][1:] == [part.stop for part, _, _ in arrays.values()][:-1]
    assert count == 8 * 5 * 2 + 4 * 8 * 2 + 8 + 2 * 16 + 2 * 8 * 6


# What the recorder would find


def test_the_recorder_finds_a_number_of_python() -> None:
    made, step = PassReplays(make_operation_recorder), [0]
    results = []
    for step[0] in range(4):
        results.append(int(made.run("shape", torch.zeros(1, dtype=torch.int32), CPU, 0, lambda words: words + step[0])))
    assert results == [0, 1, 1, 1]  # recorded in the second


@pytest.mark.parametrize(
    "compute",
    [
        lambda words: words * int(words[0]),  # waits for a value
        lambda words: words.nonzero(),  # a result whose size is a value
        lambda words: words + torch.tensor([3]),  # brings a tensor from Python
    ],
)
def test_what_cannot_be_recorded_is_computed_and_said_once(compute: Any, caplog: pytest.LogCaptureFixture) -> None:
    made, words = PassReplays(make_operation_recorder), torch.arange(1, 4, dtype=torch.int32)
    with caplog.at_level(logging.WARNING):
        results = [made.run("shape", words, CPU, 0, compute) for _ in range(4)]
    assert all(torch.equal(result, compute(words)) for result in results)
    assert len(caplog.records) == 1
    assert "all are computed from here on" in caplog.text
    assert not made.is_on


# Without a GPU


def test_a_cpu_and_an_eager_engine_replay_nothing() -> None:
    assert not make_replays(CPU, is_eager=False).is_on
    assert not make_replays(torch.device("cuda"), is_eager=True).is_on
    assert make_replays(torch.device("cuda"), is_eager=False).is_on


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens where no graph can be captured")
def test_a_graph_that_cannot_be_captured_costs_no_answer(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's own recorder, on a machine that has no CUDA."""
    requests = [make_request(key) for key in range(4)]
    expected = answer_all(folder, requests)
    monkeypatch.setattr(engine_module, "make_replays", lambda *_: PassReplays(make_graph_recorder))
    with caplog.at_level(logging.WARNING, logger=replay.__name__):
        check_alike(answer_all(folder, requests), expected)
    assert len(caplog.records) == 1


def test_memory_that_runs_out_while_recording_costs_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [make_request(key) for key in range(4)]
    expected, tried = answer_all(folder, requests), list[int]()

    def fail() -> Any:
        tried.append(1)
        raise torch.OutOfMemoryError("no memory for a graph")

    monkeypatch.setattr(engine_module, "make_replays", lambda *_: PassReplays(fail))
    check_alike(answer_all(folder, requests), expected)
    assert tried == [1]


def test_a_request_that_finds_no_memory_leaves_none_behind(folder: Path, replays: list[ComparedReplays]) -> None:
    engine = TransformersEngine(str(folder), threads=1)
    build, fails = engine._model.encoder.build_pixel_values, list[int]()

    def fail_later(images: Any) -> Any:
        if images and fails:
            raise torch.OutOfMemoryError("no memory")
        return build(images)

    vars(engine._model.encoder)["build_pixel_values"] = fail_later
    asyncio.run(engine.complete(make_request(0, "", max_tokens=20)))
    assert replays[0].batch is not None
    assert (replays[0].recordings, replays[0].batch.cache.shape) == (1, (1, COLUMN_STEP))
    fails.append(1)
    with pytest.raises(DocumentError, match="no memory on cpu"):
        asyncio.run(engine.complete(make_request(1, "", max_tokens=20)))
    assert (len(replays[0]._recorded), replays[0].batch.cache.shape) == (0, (0, 0))
    engine.close()


def test_an_engine_that_is_closed_keeps_no_recordings(folder: Path, replays: list[ComparedReplays]) -> None:
    answer_all(folder, [make_request(0, "", max_tokens=20)])
    assert (replays[0].recordings, len(replays[0]._recorded)) == (1, 0)


def test_rows_that_are_evicted_take_the_recordings_with_them(folder: Path, replays: list[ComparedReplays]) -> None:
    """Graphs hold memory; where it runs out, they give it back before another pass is tried."""
    engine = TransformersEngine(str(folder), threads=1, batch_size=6)
    encoder, held = engine._model.encoder, list[int]()
    build = encoder.build_pixel_values
    requests = [make_request(key, "", max_tokens=40) for key in range(6)]

    def fail_once(images: Any) -> Any:
        if images and replays[0].recordings and not held:
            held.append(len(replays[0]._recorded))
            raise torch.OutOfMemoryError("no memory")
        if images and held:
            held.append(len(replays[0]._recorded))
        return build(images)

    vars(encoder)["build_pixel_values"] = fail_once

    async def ask() -> list[Completion]:
        early = [asyncio.ensure_future(engine.complete(request)) for request in requests[:3]]
        while not (replays and replays[0].recordings):
            await asyncio.sleep(0.001)
        return await asyncio.gather(*early, *map(engine.complete, requests[3:]))

    answers = asyncio.run(ask())
    engine.close()
    assert all(isinstance(answer, Completion) for answer in answers)
    assert held[0] >= 1
    assert held[1] == 0
