"""What a pass of the engine `transformers` copies and allocates, counted on a CPU: no figure here is a time.

Copies between CPU and GPU are counted on fake tensors of the device `cuda`: torch computes shapes and devices of every operation, refuses
operations between two devices, and raises where a value would have to be read from the device.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.engines.transformers import TransformersEngine
from pipeline.engines.transformers import generate as generation
from pipeline.engines.transformers.attention import NAME, attend_grouped, build_mask
from pipeline.engines.transformers.batch import Batch, BatchRow, PassShape, StagedPass, choose_width, is_choosing, stage_pass
from pipeline.engines.transformers.cache import COLUMN_STEP, KeyValueCache
from pipeline.engines.transformers.generate import LoadedModel, choose_replayed_shape, choose_shape, compute_pass, run_step
from pipeline.engines.transformers.replay import PassReplays
from pipeline.records import Request, Sampling
from pipeline.schema import prompt
from tests.support import tiny_checkpoint
from tests.support.recording import OperationRecorder, make_operation_recorder
from tests.support.requests import FLAT, make_noise
from tests.support.tiny_checkpoint import FAMILIES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    engine = TransformersEngine(str(tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp("tiny"))), threads=1)
    yield engine._model
    engine.close()


def start_batch(model: LoadedModel, rows: int = 4, side_px: int = 84, **sampling: Any) -> Batch:
    """Return a batch after its first passes, until a row has forced tokens pending; its rows have prompts of different lengths."""
    batch = Batch(model.make_cache(), 1024)
    for key in range(rows):
        messages = prompt.build_messages("s", [make_noise(key, 28 * (2 + key), side_px)])
        request = Request(str(key), messages, FLAT, Sampling(**{"max_tokens": 60, **sampling}))
        constraint = model.vocabulary.start_constraint(FLAT if key % 2 else "")
        batch.add([BatchRow(model.encoder.encode(messages), request.sampling, constraint, 60)])
    run_step(model, batch, range(rows))
    while rows > 1 and max(len(row.pending) for row in batch.rows) == 1:
        run_step(model, batch, range(rows))
    return batch


# Copies to and from the device


class CopyCounter(TorchDispatchMode):
    """Counts the operations whose tensors are on two devices: those are copies."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before, after = ({leaf.device.type for leaf in tree_leaves(t) if isinstance(leaf, torch.Tensor)} for t in ((args, kwargs), result))
        if len(before | after) > 1:
            self.copies.append((",".join(sorted(before)), ",".join(sorted(after))))
        return result


SAMPLINGS = [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 40}, {"repetition_penalty": 1.3}]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("width", [1, 8])
def test_a_step_copies_once_to_the_device_and_once_back(
    model: LoadedModel, sampling: dict[str, Any], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = start_batch(model, **sampling)
    monkeypatch.setattr(generation, "choose_width", lambda *_: width)
    staged = stage_rows(model, batch, choose_shape(model, batch, range(4)))
    assert count_copies(model, staged) == [("cpu", "cuda"), ("cuda", "cpu")]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_replay_copies_once_to_the_device_and_once_back(model: LoadedModel, sampling: dict[str, Any]) -> None:
    check_copies_of_replays(model, start_batch(model, **sampling))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2_5_vl"])
def test_a_replay_of_every_family_copies_once_to_the_device_and_once_back(family: str, tmp_path: Path) -> None:
    engine = TransformersEngine(str(tiny_checkpoint.build_checkpoint(tmp_path, family=family)), threads=1)
    model = engine._model
    batch = Batch(model.make_cache(), 1024)
    for _ in range(2):
        encoded = model.encoder.encode(prompt.build_messages("s", [make_noise(0, 2 * FAMILIES[family], 2 * FAMILIES[family])]))
        batch.add([BatchRow(encoded, Sampling(max_tokens=60), model.vocabulary.start_constraint(FLAT), 60)])
    run_step(model, batch, range(2))
    engine.close()
    check_copies_of_replays(model, batch)


def check_copies_of_replays(model: LoadedModel, batch: Batch) -> None:
    """Run the batch's next step four times on a fake GPU: computed, recorded and replayed, and replayed twice."""
    staged = stage_rows(model, batch, choose_replayed_shape(model, batch))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        there = replace(model, network=copy_to_fake_gpu(model.network, fake), device=torch.device("cuda"))
        copied = Batch(there.make_cache(), 1024, PassReplays(lambda: lambda compute, words: (lambda: compute(words), compute(words))))
        copied.cache._resize(4, COLUMN_STEP)
        kept = replace(staged, words=fake.from_tensor(staged.words))
        counts = []
        with OperationRecorder() as recorded:
            compute_pass(there, copied.cache, staged.shape, fake.from_tensor(staged.words).to(there.device), {})
        assert {tensor.device.type for tensor in recorded.list_outside() if tensor.device.type != "cpu"} == {"cuda"}
        assert [tensor.shape for tensor in recorded.list_outside() if tensor.device.type == "cpu"] == [staged.words.shape]
        for _ in range(4):
            with CopyCounter() as counter:
                copied.replays.run(
                    kept.shape, kept.words, there.device, 1, lambda words: compute_pass(there, copied.cache, kept.shape, words, {})
                ).cpu()
            counts.append(counter.copies)
    assert (copied.replays.recordings, copied.replays.replays) == (1, 3)
    computed, replayed = [("cpu", "cuda"), ("cuda", "cpu")], [("cpu,cuda", "cuda"), ("cuda", "cpu")]  # copied into words that are there
    assert counts == [computed, computed, replayed, replayed]


def stage_rows(model: LoadedModel, batch: Batch, shape: PassShape) -> StagedPass:
    """Return what a pass of this shape over all rows needs."""
    choosing = [row.constraint for row in batch.rows if is_choosing(row, min(len(row.pending), shape.width))]
    return stage_pass(batch, shape, len(batch), model.vocabulary.compute_masks(choosing), model.pad_id, pinned=False)


def count_copies(model: LoadedModel, staged: StagedPass) -> list[tuple[str, str]]:
    """Return the copies of a pass on a fake GPU, from and to."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.inference_mode():
        network = copy_to_fake_gpu(model.network, fake)
        there = replace(model, network=network, device=torch.device("cuda"))
        cache = there.make_cache()
        cache._resize(4, COLUMN_STEP)
        with CopyCounter() as counter:
            words = fake.from_tensor(staged.words).to(there.device)
            compute_pass(there, cache, staged.shape, words, {}).cpu()
    return counter.copies


def test_a_part_of_a_prompt_is_copied_once_to_the_device(model: LoadedModel) -> None:
    batch = start_batch(model, rows=1)
    row = batch.rows[0]
    row.cached, row.pending, row.tokens, row.unscored = len(row.prompt.ids) - 12, row.prompt.ids[-12:], [], 0
    batch.part_tokens = 8
    staged = stage_rows(model, batch, choose_shape(model, batch, range(1)))
    assert (staged.shape.is_first, staged.fed, row.is_reading, is_choosing(row, 8)) == (False, (8,), True, False)
    assert count_copies(model, staged) == [("cpu", "cuda"), ("cuda", "cpu")]


def copy_to_fake_gpu(network: Any, fake: FakeTensorMode) -> Any:
    """Return the network with fake parameters and buffers on the device `cuda`."""
    with torch.device("meta"):
        made = type(network)(copy.deepcopy(network.config))
    for module in made.modules():
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                if value is not None:
                    fresh = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    kept[name] = torch.nn.Parameter(fresh, requires_grad=False) if kept is module._parameters else fresh
    return made.eval()


def test_the_counter_sees_what_would_wait_for_the_device() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), CopyCounter() as counter:
        there = torch.empty(3, device="cuda")
        assert there.cpu().to("cuda").device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            there.tolist()
    assert len(counter.copies) == 2


# Copies of the cache


def list_large_allocations(run: Callable[[], object], least_bytes: int) -> list[str]:
    """Return the names of the operations that allocate at least so much; those inside fused operations are among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    return [event.name for event in seen.events() if event.self_cpu_memory_usage >= least_bytes]


@pytest.mark.parametrize("width", [1, 8])
def test_no_step_allocates_as_much_as_one_layers_keys(model: LoadedModel, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = start_batch(model, side_px=2800)
    monkeypatch.setattr(generation, "choose_width", lambda *_: width)
    batch.cache.reserve(4, batch.tokens + 16)
    keys = batch.cache.layers[0].keys
    of_one_layer = 4 * keys.shape[1] * batch.tokens * keys.shape[3] * keys.element_size()
    assert list_large_allocations(lambda: torch.cat([keys, keys]), of_one_layer)  # the check can fail
    fed = {min(len(row.pending), width) for row in batch.rows}
    assert list_large_allocations(lambda: run_step(model, batch, range(4)), of_one_layer) == []
    assert len(fed) == (1 if width == 1 else 2)


def test_no_replay_allocates_as_much_as_one_layers_keys(model: LoadedModel) -> None:
    batch = start_batch(model, side_px=2800)
    batch.replays = PassReplays(make_operation_recorder)
    batch.cache.reserve(4, batch.tokens + 16)
    keys = batch.cache.layers[0].keys
    of_one_layer = 4 * keys.shape[1] * batch.tokens * keys.shape[3] * keys.element_size()
    found = [list_large_allocations(lambda: run_step(model, batch, range(4)), of_one_layer) for _ in range(8)]
    assert batch.replays.replays > 2
    assert found == [[]] * 8


class PeakMeter(TorchDispatchMode):
    """Measures the most bytes of tensors that live at once, storages counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[torch.Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [weakref.ref(leaf) for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.seen = [ref for ref in self.seen if ref() is not None]
        alive = [tensor.untyped_storage() for ref in self.seen if (tensor := ref()) is not None]
        self.peak = max(self.peak, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return result


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reserve(9, 500),  # a row joins
        lambda cache: cache.reserve(8, 600),  # answers grow
        lambda cache: cache.move_row(7, 2),  # a row leaves
        lambda cache: cache.shrink(1, 200),  # most rows have left
    ],
)
def test_joining_growing_leaving_and_shrinking_take_a_tenth_of_the_cache_at_most(change: Callable[[KeyValueCache], None]) -> None:
    cache = KeyValueCache(28, 4, 16, torch.float16, CPU)
    cache.reserve(8, 500)
    before = [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]
    old_bytes = sum(buffer.nbytes for buffer in before)
    with PeakMeter() as meter:
        meter.seen = [weakref.ref(buffer) for buffer in before]
        del before
        change(cache)
    new_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 0 < meter.peak <= 1.1 * max(old_bytes, new_bytes)


def test_growing_keeps_what_the_rows_hold() -> None:
    cache = KeyValueCache(2, 2, 4, torch.float32, CPU)
    cache.reserve(2, 10)
    with torch.inference_mode():
        cache.layers[1].values.normal_()
    held = cache.layers[1].values.clone()
    cache.reserve(5, 300)
    assert cache.shape == (5, 512)
    assert torch.equal(cache.layers[1].values[:2, :, :COLUMN_STEP], held)


def test_rows_beyond_the_budget_are_refused_but_one_row_never_is() -> None:
    cache = KeyValueCache(1, 1, 4, torch.float32, CPU, max_tokens=2 * COLUMN_STEP)
    cache.reserve(2, COLUMN_STEP)
    with pytest.raises(torch.OutOfMemoryError, match="3 rows of 256 tokens exceed the budget of 512 tokens"):
        cache.reserve(3, COLUMN_STEP)
    cache.reserve(1, 5 * COLUMN_STEP)


def test_rows_leave_where_there_is_no_memory_to_shrink_the_cache(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = start_batch(model, rows=6)

    def fail(*_: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(batch.cache, "_resize", fail)
    batch.remove(batch.rows[1:])
    run_step(model, batch, range(1))
    assert len(batch) == 1


# Attention


@pytest.mark.parametrize("width", [1, 3])
def test_grouped_attention_is_that_of_repeated_keys(width: int) -> None:
    cached, columns, groups = torch.tensor([5, 0, 9]), 16, 3
    query, key, value = torch.randn(3, 6, width, 8), torch.randn(3, 2, columns, 8), torch.randn(3, 2, columns, 8)
    mask = build_mask(cached, width, columns, groups, torch.float32)
    found, _ = attend_grouped(None, query, key, value, mask, scaling=0.3)
    visible = torch.arange(columns) <= (cached[:, None] + torch.arange(width))[:, None, :, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), attn_mask=visible, scale=0.3
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_row_alone_attends_without_copies_of_its_keys() -> None:
    width, columns, groups = 16, 4096, 3
    query, key, value = torch.randn(1, 6, width, 64), torch.randn(1, 2, columns, 64), torch.randn(1, 2, columns, 64)
    mask = build_mask(torch.tensor([columns - width]), width, columns, 1, torch.float32)
    assert mask.shape == (1, 1, width, columns)
    found = list[Any]()
    assert list_large_allocations(lambda: found.append(attend_grouped(None, query, key, value, mask, scaling=0.3)[0]), key.nbytes) == []
    whole = torch.cat([torch.zeros(1, 6, columns - width, 64), query], 2)
    repeated = (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(whole, *repeated, is_causal=True, scale=0.3)[:, :, -width:]
    torch.testing.assert_close(found[0], expected.transpose(1, 2))


def test_only_the_language_model_has_grouped_attention(model: LoadedModel) -> None:
    assert model.network.config.get_text_config()._attn_implementation == NAME
    assert model.network.config.vision_config._attn_implementation == "sdpa"


# Forced tokens


@pytest.mark.parametrize(
    ("pending", "cost", "width"),
    [
        ([6], 256, 6),  # alone: a pass costs the same
        ([5, 1, 1, 1, 1, 1, 1, 1], 256, 5),  # small batches: 12 tokens for 296 are cheaper than 8 for 264
        ([5] + [1] * 63, 256, 1),  # large ones: 68 tokens for 576 are dearer than 64 for 320
        ([5] * 64, 256, 5),
        ([5, 1, 1, 1, 1, 1, 1, 1], 16, 1),
    ],
)
def test_forced_tokens_are_fed_along_while_each_token_gets_cheaper(model: LoadedModel, pending: list[int], cost: int, width: int) -> None:
    (row,) = start_batch(model, rows=1).rows
    rows = [copy.copy(row) for _ in pending]
    for one, count in zip(rows, pending, strict=True):
        one.pending = [7] * count
    assert choose_width(rows, cost) == width


def test_an_answer_is_the_same_with_forced_tokens_one_at_a_time(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for width in (1, 2, 99):
        monkeypatch.setattr(generation, "choose_width", lambda rows, _, most=width: min(most, max(len(row.pending) for row in rows)))
        batch = start_batch(model)
        rows = list(batch.rows)
        while batch.rows:
            batch.remove([row for row in batch.rows if row.is_finished])
            if batch.rows:
                run_step(model, batch, range(len(batch)))
        answers.append([(row.tokens, row.outcome) for row in rows])
        assert all(len(row.logprobs) == len(row.tokens) and np.isfinite(row.logprobs).all() for row in rows)
    assert answers[0] == answers[1] == answers[2]
