"""How fast are the engines on this GPU, and are they right? One command on a bare machine: torch, and vLLM if installed; no network.

    python benchmarks/gpu.py                          7B in the published AWQ layout, random weights: on a GPU
    python benchmarks/gpu.py --pages 64 --batches 8 64 --engines transformers        where a GPU is had for minutes
    python benchmarks/gpu.py --small                  the same with a model of 2 million weights: on a CPU, as the tests run it

It writes a checkpoint with random weights (speed does not depend on their values), asks about pages of noise through the engines' own
`complete`, and has answers come out at given lengths by their grammar: 0.5 to 1.5 times 400 tokens, none of them forced. A table shows
pages/s over engines, weights, batch sizes and pages of a request, the share of the bound

    pages/s <= 1 / (work of a page / peak TFLOP/s + answer tokens x weights read in a step / batch / peak bandwidth)
    work of a page = 2 x weights of the language model x (visual + prompt + answer tokens) + 2 x weights of the vision tower x patches

and where the time of a step goes. transformers is measured without CUDA graphs and with them, one after the other for each batch size. Then
come checks of correctness, among them that replayed steps give what computing them gives. The exit code is 1 if one of them fails or, on an
H100 or H200, a target is missed: 3 pages/s with transformers, 8 with vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from pipeline.budget import PixelBudget, count_visual_tokens, fit_page
from pipeline.demo.model import build_processor, build_tokenizer, load_demo_schemas
from pipeline.demo.quantize import pack_columns
from pipeline.engines import checkpoint
from pipeline.engines.choice import count_weight_bytes
from pipeline.engines.limits import count_token_bytes
from pipeline.engines.transformers import TransformersEngine, awq, generate
from pipeline.engines.transformers.replay import Computation, Recorder
from pipeline.errors import DocumentError, EngineDead
from pipeline.records import Completion, Request, Sampling
from pipeline.schema import prompt

ROOT = Path(__file__).parents[1]
A4_PT = (595.0, 842.0)
PEAKS = {"H200": (989.0, 4.8), "H100": (989.0, 3.35), "A100": (312.0, 2.0), "L40S": (362.0, 0.86), "L4": (121.0, 0.3), "A10G": (70.0, 0.6)}
"""Dense bf16 TFLOP/s and TB/s by the vendor's data sheets; those of another device are measured."""
LENGTHS = (1.0, 0.5, 1.3, 0.8, 1.5, 0.7, 1.2)
"""Lengths of answers one after another, as shares of their mean."""
TARGETS = {"transformers": 3.0, "vllm": 8.0}
GROUP = 128
MODELS: dict[str, dict[str, Any]] = {
    "7b": {
        "text": {
            "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "max_position_embeddings": 128_000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "budget": PixelBudget(),
        "answer": 400,
        "batches": (8, 32, 64, 128),
        "per_request": (1, 4),
        "pages": 256,
    },
    "small": {
        "text": {
            "vocab_size": 384, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        "vision": {
            "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 128, "patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [1],
        },
        "budget": PixelBudget(4 * 784, 16 * 784),
        "answer": 40,
        "batches": (2, 4),
        "per_request": (1, 2),
        "pages": 8,
    },
}  # fmt: skip
"""Qwen2.5-VL-7B-Instruct-AWQ by its published config.json, and a model of the same kind for a CPU."""


# ---- Checkpoint ---------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Write a checkpoint with random weights in the published AWQ layout, one file for each layer of the language model."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

    words = build_tokenizer(load_demo_schemas(ROOT / "schemas"))
    build_processor(words).save_pretrained(folder)
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("im_end", "endoftext", "image_pad", "video_pad")}
    starts = {name: words.convert_tokens_to_ids(f"<|vision_{name}|>") for name in ("start", "end")}
    config = Qwen2_5_VLConfig(
        text_config={**shape["text"], "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"]},
        vision_config=shape["vision"], image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=starts["start"], vision_end_token_id=starts["end"], tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        loader: Any = AutoModelForImageTextToText
        network = loader.from_config(config)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in network.named_parameters():
        published = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        file = f"model-{published.split('.')[2] if published.startswith('model.layers.') else 'rest'}.safetensors"
        files.setdefault(file, {})[published] = tuple(parameter.shape)
    index = {}
    for file, shapes in files.items():
        tensors = {key: value for name, shape_of in shapes.items() for key, value in draw_weights(name, shape_of, generator).items()}
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    block = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "modules_to_not_convert": ["visual"],
    }
    written = {**config.to_dict(), "quantization_config": block, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(written, default=str))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["im_end"]}))


def draw_weights(name: str, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return a parameter's stored tensors: 1 for norms, 0 for biases, packed numbers for the language model's layers, else normal ones.

    A weight has the variance 1 / inputs, so that activations keep their size.
    """
    if len(shape) == 1:
        return {name: torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.float16)}
    deviation = 1 / math.sqrt(math.prod(shape[1:]))
    if not name.startswith("model.layers."):
        return {name: (torch.randn(shape, generator=generator) * deviation).half()}
    outputs, inputs = shape
    layer = name.removesuffix(".weight")
    return {
        f"{layer}.qweight": torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), generator=generator, dtype=torch.int32),
        f"{layer}.qzeros": pack_columns(torch.full((inputs // GROUP, outputs), 8)),
        f"{layer}.scales": torch.full((inputs // GROUP, outputs), deviation / 4.6, dtype=torch.float16),  # numbers 0 to 15: deviation 4.6
    }


# ---- Requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is asked: pages of noise, and answers of a length that the grammar fixes."""

    width_px: int
    height_px: int
    page_tokens: int
    answer_tokens: int
    """The mean; `LENGTHS` are those of requests one after another."""

    @classmethod
    def build(cls, shape: dict[str, Any]) -> Workload:
        size = fit_page(*A4_PT, 200.0, shape["budget"])
        return cls(size.width_px, size.height_px, count_visual_tokens(size), int(shape["answer"]))

    def count_letters(self, key: int) -> int:
        """Return the length of the text in an answer: a letter is a token, and ten tokens are the object around it."""
        return round(self.answer_tokens * LENGTHS[key % len(LENGTHS)]) - 10

    def build_schema(self, key: int) -> str:
        """Return a schema that allows texts of one length only."""
        text = {"type": "string", "pattern": f"^[a-z ]{{{self.count_letters(key)}}}$"}
        return json.dumps({"type": "object", "additionalProperties": False, "required": ["text"], "properties": {"text": text}})

    def build_request(self, key: int, pages: int, schema: str | None = None, max_tokens: int | None = None) -> Request:
        """Return a request about pages that no other request has."""
        noise = np.random.default_rng(key)
        images = [noise.integers(0, 256, (self.height_px, self.width_px, 3), dtype=np.uint8) for _ in range(pages)]
        names = tuple(f"{key}/{at}" for at in range(pages))
        sampling = Sampling(max_tokens=max_tokens or self.answer_tokens * 2)
        return Request(
            str(key),
            prompt.build_messages("Return what the page shows.", images),
            self.build_schema(key) if schema is None else schema,
            sampling,
            names,
        )


def ask_all(engine: Any, requests: Sequence[Request]) -> list[Completion | BaseException]:
    async def gather() -> list[Completion | BaseException]:
        return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)

    return asyncio.run(gather())


# ---- Measurements -------------------------------------------------------------------------------------------------


@dataclass
class StepTimes:
    """Seconds of each part of the engine's passes; each part waits for the device at its end."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    mask: float = 0.0
    total: float = 0.0
    passes: int = 0
    row_passes: int = 0
    """Rows over all decoding passes."""
    parts: list[str] = field(default_factory=lambda: ["vision", "prefill", "decode", "mask"])

    def format(self) -> str:
        host = max(0.0, self.total - sum(getattr(self, part) for part in self.parts))
        shares = [(part, getattr(self, part)) for part in self.parts] + [("host", host)]
        listed = ", ".join(f"{part} {seconds:.2f} s ({seconds / max(self.total, 1e-9):.0%})" for part, seconds in shares)
        return f"{listed}; a decoding pass {self.decode / max(self.passes, 1) * 1e3:.1f} ms"


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def time_steps(engine: TransformersEngine) -> Iterator[StepTimes]:
    """Time what the engine's passes do meanwhile. The waiting costs some of the speed, so throughput is measured without."""
    times = StepTimes()
    network, vocabulary = engine._model.network, engine._model.vocabulary
    visual, masks, compute, step = network.model.visual.forward, vocabulary.compute_masks, generate.run_pass, generate.run_step

    def spend(work: Callable[[], Any]) -> tuple[Any, float]:
        wait_for_device()
        started = time.perf_counter()
        result = work()
        wait_for_device()
        return result, time.perf_counter() - started

    def see(*args: Any, **kwargs: Any) -> Any:
        result, seconds = spend(lambda: visual(*args, **kwargs))
        times.vision += seconds
        return result

    def mask(*args: Any) -> Any:
        result, seconds = spend(lambda: masks(*args))
        times.mask += seconds
        return result

    def run_pass(model: Any, batch: Any, staged: Any, *given: Any) -> Any:
        before, is_reading = times.vision, batch.rows[staged.shape.start].is_reading
        result, seconds = spend(lambda: compute(model, batch, staged, *given))
        if is_reading:
            times.prefill += seconds - (times.vision - before)
        else:
            times.decode += seconds
            times.passes, times.row_passes = times.passes + 1, times.row_passes + len(staged.fed)
        return result

    def run_whole(*args: Any) -> None:
        _, seconds = spend(lambda: step(*args))
        times.total += seconds

    from pipeline.engines import transformers as module

    network.model.visual.forward, vocabulary.compute_masks = see, mask
    generate.run_pass, module.run_step = run_pass, run_whole  # type: ignore[attr-defined]
    try:
        yield times
    finally:
        network.model.visual.forward, vocabulary.compute_masks = visual, masks
        generate.run_pass, module.run_step = compute, step  # type: ignore[attr-defined]


def read_cpu_s() -> float:
    """Return the CPU seconds of this process and its children."""
    me = psutil.Process()
    spent = 0.0
    for process in [me, *me.children(recursive=True)]:
        used = process.cpu_times()
        spent += used.user + used.system
    return spent


def measure_peaks(device: torch.device) -> tuple[float, float]:
    """Return TFLOP/s and TB/s: by the data sheet, or those of a matrix product and of a copy here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if known := next((peaks for key, peaks in PEAKS.items() if key in name), None):
        return known
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    one, other = (torch.ones((side, side), dtype=dtype, device=device) for _ in range(2))
    seconds = {}
    for what, work in (("product", lambda: one @ other), ("copy", lambda: other.copy_(one))):
        times = []
        for _ in range(10):  # the fastest: other processes may be at work, too
            wait_for_device()
            started = time.perf_counter()
            work()
            wait_for_device()
            times.append(time.perf_counter() - started)
        seconds[what] = min(times)
    return 2 * side**3 / seconds["product"] / 1e12, 2 * side * side * one.element_size() / seconds["copy"] / 1e12


@dataclass(frozen=True)
class Bound:
    """What no engine on this device can be faster than."""

    tflops: float
    tbytes_s: float
    language: int
    tower: int
    weight_bytes: int
    token_bytes: int

    def compute_pages_per_s(self, load: Workload, prompt_tokens: float, batch: int, per_request: int) -> float:
        """Return the bound by the formula on top of this file, keys and values read in each step included."""
        answer = load.answer_tokens / per_request
        work = 2 * self.language * (prompt_tokens + answer) + 2 * self.tower * load.page_tokens * 4
        read = self.weight_bytes / batch + self.token_bytes * prompt_tokens * per_request
        return 1 / (work / self.tflops / 1e12 + answer * read / self.tbytes_s / 1e12)


def find_bound(config: dict[str, Any], peaks: tuple[float, float], device: torch.device, packed: bool) -> Bound:
    """Return the bound of a model on a device with these peaks (TFLOP/s, TB/s), for weights of 4, 16 or, on a CPU, 32 bits."""
    sizes, text = count_weight_bytes(config), config["text_config"]
    language = (
        text["num_hidden_layers"]
        * text["hidden_size"]
        * (2 * text["hidden_size"] * (1 + text["num_key_value_heads"] / text["num_attention_heads"]) + 3 * text["intermediate_size"])
    )
    tower = sizes.unpacked // 2 - int(language) - 2 * text["vocab_size"] * text["hidden_size"]
    held = sizes.packed if packed and sizes.packed else sizes.unpacked * (1 if device.type == "cuda" else 2)
    return Bound(*peaks, int(language), tower, int(held), count_token_bytes(config, False))


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    engine: str
    weights: str
    graphs: str
    """"on" or "off"; "–" where there are none."""
    batch: int
    per_request: int
    pages_per_s: float
    tokens_per_s: float
    share: float
    cpu_ms: float
    memory_gb: float
    slots: float | None

    def format(self) -> str:
        slots = f"{self.slots:6.0%}" if self.slots is not None else "     –"
        return (
            f"{self.engine:<13}{self.weights:<6}{self.graphs:<6}{self.batch:>6}{self.per_request:>7}{self.pages_per_s:>10.2f}{self.tokens_per_s:>10.0f}"
            f"{self.share:>9.1%}{self.cpu_ms:>9.1f}{self.memory_gb:>9.2f} {slots}"
        )


HEADING = "engine       held  graphs batch  pages   pages/s  tokens/s    bound  CPU ms   GB max  useful slots"


def measure(engine: Any, weights: str, batch: int, per_request: int, pages: int, load: Workload, bound: Bound) -> Result:
    """Ask about so many pages, after a first request that warms up, and return what that took. Raises the first failure."""
    raise_failures(ask_all(engine, [load.build_request(10**6, per_request)]))
    requests = [load.build_request(key, per_request) for key in range(max(1, pages // per_request))]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    counts = StepTimes()
    restore = count_rows(engine, counts)
    cpu_s, started = read_cpu_s(), time.perf_counter()
    answers = raise_failures(ask_all(engine, requests))
    elapsed, cpu_s = time.perf_counter() - started, read_cpu_s() - cpu_s
    restore()
    asked = len(requests) * per_request
    written = sum(answer.usage.completion_tokens for answer in answers)
    prompt_tokens = sum(answer.usage.prompt_tokens for answer in answers) / asked
    rate = asked / elapsed
    slots = counts.row_passes / (counts.passes * min(batch, len(requests))) if counts.passes else None
    memory = measure_memory(engine)
    limit = bound.compute_pages_per_s(load, prompt_tokens, min(batch, len(requests)), per_request)
    graphs = "–" if engine.name != "transformers" or not torch.cuda.is_available() else "on" if engine._replays.is_on else "off"
    share, cpu_ms = rate / limit, cpu_s / asked * 1e3
    return Result(engine.name, weights, graphs, batch, per_request, rate, written / elapsed, share, cpu_ms, memory, slots)


def count_rows(engine: Any, counts: StepTimes) -> Callable[[], None]:
    """Count decoding passes and their rows, which costs nothing; return what ends that."""
    if engine.name != "transformers":
        return lambda: None
    compute = generate.run_pass

    def run_pass(model: Any, batch: Any, staged: Any, *given: Any) -> Any:
        if not batch.rows[staged.shape.start].is_reading:
            counts.passes, counts.row_passes = counts.passes + 1, counts.row_passes + len(staged.fed)
        return compute(model, batch, staged, *given)

    generate.run_pass = run_pass

    def restore() -> None:
        generate.run_pass = compute

    return restore


@contextmanager
def switch_graphs(engine: TransformersEngine, is_on: bool) -> Iterator[None]:
    """Have the engine, which has nothing to do, replay steps or not; without a GPU, and once a capture has failed, that changes nothing."""
    replays = engine._replays
    before = replays.is_on
    replays.is_on = before and is_on
    try:
        yield
    finally:
        replays.is_on = before and (replays.is_on or not is_on)


@contextmanager
def count_recordings(engine: TransformersEngine) -> Iterator[list[float]]:
    """Yield the seconds that each recording took, and note the memory that it took at the end."""
    replays, taken = engine._replays, list[float]()
    record = replays._record

    def time_recording(words: Any, compute: Any) -> Any:
        wait_for_device()
        started = time.perf_counter()
        result = record(words, compute)
        wait_for_device()
        taken.append(time.perf_counter() - started)
        return result

    replays._record = time_recording  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        replays._record = record  # type: ignore[method-assign]


def measure_memory(engine: Any) -> float:
    """Return GB: the GPU's most so far (vLLM's processes: what is in use now), on a CPU this process and its children's memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (torch.cuda.max_memory_allocated() if engine.name == "transformers" else total - free) / 1e9
    return sum(process.memory_info().rss for process in [psutil.Process(), *psutil.Process().children(recursive=True)]) / 1e9


def raise_failures(outcomes: Sequence[Completion | BaseException]) -> list[Completion]:
    """Return the answers; raise the first outcome that is none."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Completion)]


def load_transformers(folder: Path, batch: int, device: torch.device, packed: bool = False) -> TransformersEngine:
    return TransformersEngine(str(folder), device=device.type, batch_size=batch, keep_int4=packed, threads=torch.get_num_threads())


def load_vllm(folder: Path, batch: int, per_request: int, shape: dict[str, Any], device: torch.device) -> Any:
    from pipeline.engines.vllm import VLLMEngine

    budget = shape["budget"]
    arguments: dict[str, Any] = {
        "max_num_seqs": batch, "limit_mm_per_prompt": {"image": per_request, "video": 0}, "mm_processor_cache_gb": 0,
        "mm_processor_kwargs": {"size": {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}},
    }  # fmt: skip
    small = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "dtype": "bfloat16"}
    arguments |= {"max_num_batched_tokens": 8192} if device.type == "cuda" else small
    return VLLMEngine(str(folder), arguments, max_request_tokens=32_768)


# ---- Correctness --------------------------------------------------------------------------------------------------


@dataclass
class Checks:
    """What was checked, and whether anything failed."""

    failed: int = 0

    def note(self, name: str, is_right: bool | None, found: str) -> None:
        """Print a line; None means that it cannot be checked here."""
        self.failed += is_right is False
        print(f"{'skip' if is_right is None else 'pass' if is_right else 'FAIL'}  {name}: {found}", flush=True)


def check_packed_layers(checks: Checks, folder: Path, device: torch.device) -> None:
    """Compare a packed layer's product with that by its unpacked weights, for few and for many rows."""
    tensors = {name: tensor for name, tensor in awq.iterate_tensors(folder, device) if name.startswith("model.layers.0.mlp.down_proj.")}
    packed = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    weight = awq.dequantize_weight(packed["qweight"], packed["qzeros"], packed["scales"], GROUP)
    layer = awq.make_packed_layer(torch.nn.Linear(*weight.shape, bias=False), packed, GROUP)
    worst = 0.0
    with plain_products(device), torch.inference_mode():
        for rows in (1, 64, 2048):
            given = torch.randn((1, rows, weight.shape[0]), device=device).half()
            wanted = given.float() @ weight.float()
            worst = max(worst, float((layer.eval()(given).float() - wanted).abs().max() / wanted.abs().max()))
    checks.note("AWQ against plain weights", worst < 0.02, f"largest difference {worst:.4f} of the largest value, 1 to 2,048 rows")


@contextmanager
def plain_products(device: torch.device) -> Iterator[None]:
    """Make autoawq multiply without its kernels where there is no GPU for them."""
    import warnings

    awq.import_autoawq("WQLinear_GEMM")
    from awq.modules.linear import gemm

    before = gemm.TRITON_AVAILABLE
    gemm.TRITON_AVAILABLE = before and device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the plain way is slow
        yield
    gemm.TRITON_AVAILABLE = before


def check_answers(checks: Checks, engine: Any, load: Workload, per_request: int) -> None:
    """Have a batch answered together and one by one: valid, of the length wanted, with finite and equal log-probabilities."""
    requests = [load.build_request(2 * 10**6 + key, per_request) for key in range(4)]
    together = raise_failures(ask_all(engine, requests))
    alone = [raise_failures(ask_all(engine, [request]))[0] for request in requests]
    lengths = [len(json.loads(answer.text)["text"]) for answer in together]
    wanted = [load.count_letters(int(request.key)) for request in requests]
    checks.note(f"{engine.name}: answers", lengths == wanted, f"texts of {sorted(lengths)} characters, as the grammar wants")
    same, worst = compare_logprobs(together, alone)
    is_exact = engine.name == "transformers" and not torch.cuda.is_available()
    is_close = worst < (1e-3 if is_exact else 0.25)  # bfloat16 has 8 bits
    checks.note(
        f"{engine.name}: a batch against single requests",
        is_close and same > 0,
        f"{same} tokens alike, log-probabilities within {worst:.4f}",
    )


def check_graphs(checks: Checks, engine: TransformersEngine, load: Workload, packed: bool) -> None:
    """Compare replayed steps with computed ones: each step bit for bit, and the answers of both ways.

    Without a GPU a replay is another computation from the same words: the shapes are those of graphs, nothing else is.
    """
    replays = engine._replays
    is_real = engine._model.device.type == "cuda"
    name = ("CUDA graphs" if is_real else "shapes of graphs") + (" (int4)" if packed else "")
    if not is_real:
        replays._make_recorder, replays.is_on = make_repeating_recorder, True
    if not replays.is_on:
        checks.note(name, False, "a capture has failed: see the warning above")
        return
    drawn = Sampling(max_tokens=load.answer_tokens * 2, temperature=1.0, top_p=0.9, top_k=50, repetition_penalty=1.1)
    requests = [load.build_request(4 * 10**6 + key, 1) for key in range(12)]
    requests = [replace(request, sampling=replace(drawn, seed=key)) if key % 3 == 2 else request for key, request in enumerate(requests)]
    with switch_graphs(engine, is_on=False):
        computed = raise_failures(ask_all(engine, requests))
    counts = ComparedSteps()
    with counts.compare(engine):
        replayed = raise_failures(ask_all(engine, requests))
    most = 0.25 if packed else 0.05  # the kernels for packed weights add in any order
    is_right = replays.is_on and counts.steps > 0 and counts.other_tokens <= counts.tokens // 100 and counts.worst < most
    checks.note(f"{name}: replayed steps as computed", is_right, counts.format())
    same, worst = compare_logprobs(replayed, computed)
    written = sum(len(answer.tokens) for answer in computed)
    alike = sum(one.text == other.text for one, other in zip(replayed, computed, strict=True))
    is_close = worst < (0.25 if is_real else 1e-3) and same > 0
    found = f"{alike} of {len(requests)} answers, {same} of {written} tokens alike, log-probabilities within {worst:.4f}"
    checks.note(f"{name}: answers with them equal those without", is_close, found)
    replays.is_on = replays.is_on and is_real


@dataclass
class ComparedSteps:
    """Replayed steps, and what computing them from the same words gave."""

    steps: int = 0
    alike: int = 0
    """Steps with the same bits."""
    tokens: int = 0
    other_tokens: int = 0
    worst: float = 0.0
    """The largest difference of margins and log-probabilities, in rows that got the same token."""

    @contextmanager
    def compare(self, engine: TransformersEngine) -> Iterator[None]:
        """Compute each step that is replayed meanwhile once more."""
        replays = engine._replays
        run = replays.run

        def run_both(shape: Any, words: torch.Tensor, device: torch.device, generation: int, compute: Computation) -> torch.Tensor:
            before = replays.replays
            result = run(shape, words, device, generation, compute)
            if replays.replays > before:
                self.note(shape.rows, result.cpu(), compute(words.to(device)).cpu())
            return result

        replays.run = run_both  # type: ignore[method-assign]
        try:
            yield
        finally:
            replays.run = run  # type: ignore[method-assign]

    def note(self, rows: int, replayed: torch.Tensor, computed: torch.Tensor) -> None:
        """Compare the results of a step (`compute_pass`)."""
        same = replayed[:rows] == computed[:rows]
        self.steps, self.alike = self.steps + 1, self.alike + int(torch.equal(replayed, computed))
        self.tokens, self.other_tokens = self.tokens + rows, self.other_tokens + int((~same).sum())
        one, other = (words[rows : 3 * rows].view(torch.float32).view(2, rows)[:, same] for words in (replayed, computed))
        difference = (one - other).abs()[(one != other) & one.isfinite() & other.isfinite()]
        self.worst = max(self.worst, float(difference.max()) if len(difference) else 0.0)

    def format(self) -> str:
        others = f"{self.other_tokens} of {self.tokens} tokens differ"
        return f"{self.alike} of {self.steps} steps bit for bit, {others}, numbers of the others by at most {self.worst:.2g}"


def make_repeating_recorder() -> Recorder:
    """Return a recorder whose replays compute again from the words, where a graph would leave the result."""

    def record(compute: Computation, words: torch.Tensor) -> tuple[Callable[[], object], torch.Tensor]:
        result = compute(words)
        return lambda: result.copy_(compute(words)), result

    return record


def compare_logprobs(one: Sequence[Completion], other: Sequence[Completion]) -> tuple[int, float]:
    """Return how many tokens agree before the first that differs in each answer, and the largest difference of their log-probabilities."""
    same, worst = 0, 0.0
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left.tokens, right.tokens, strict=False):
            if a.text != b.text:
                break
            same, worst = same + 1, max(worst, abs(a.logprob - b.logprob))
    return same, worst


@contextmanager
def leave_out_grammar(engine: Any) -> Iterator[None]:
    """Let vLLM choose among the tokens of text without a grammar: under one its log-probabilities are among the allowed tokens.

    Those of transformers are among all tokens, and so are vLLM's where `allowed_token_ids` restricts the choice.
    """
    from pipeline.engines import vllm as module

    build, vocabulary = module.build_sampling_params, engine._vocabulary
    masks = torch.from_numpy(np.array(vocabulary.compute_masks([vocabulary.start_constraint("")])))
    allowed = generate.unpack_masks(masks, vocabulary.size)[0].nonzero().flatten().tolist()

    def build_free(*given: Any) -> Any:
        sampling = build(*given)
        sampling.structured_outputs, sampling.allowed_token_ids = None, allowed
        return sampling

    module.build_sampling_params = build_free
    try:
        yield
    finally:
        module.build_sampling_params = build


def check_memory_recovery(checks: Checks, engine: TransformersEngine, load: Workload) -> None:
    """Ask about a page for which there is no memory beside others: it fails alone, they are answered, and the engine goes on."""
    large = replace(load, width_px=load.width_px * 4, height_px=load.height_px * 4)
    requests = [load.build_request(key, 1) for key in range(3)] + [large.build_request(99, 1)]
    encoder, limit = engine._model.encoder, large.width_px * large.height_px
    build = encoder.build_pixel_values

    def refuse_large(images: Any) -> Any:
        if any(image.shape[0] * image.shape[1] >= limit for image in images):
            raise torch.OutOfMemoryError("injected: no memory for this page")
        return build(images)

    is_real = engine._model.device.type == "cuda"
    if is_real:
        with switch_graphs(engine, is_on=False):
            raise_failures(ask_all(engine, [load.build_request(6, 1)]))  # leaves no cache behind, in which the large page could find room
        engine._replays.drop_recordings()
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved() + 3 * 2**29  # 1.5 GiB: enough for the pages of the others
        torch.cuda.set_per_process_memory_fraction(min(1.0, used / torch.cuda.mem_get_info()[1]))
    else:
        encoder.build_pixel_values = refuse_large  # type: ignore[method-assign]
    try:
        *others, lost = ask_all(engine, requests)
    finally:
        encoder.build_pixel_values = build  # type: ignore[method-assign]
        if is_real:
            torch.cuda.set_per_process_memory_fraction(1.0)
    after = ask_all(engine, [load.build_request(5, 1)])[0]
    is_right = all(isinstance(one, Completion) for one in [*others, after]) and isinstance(lost, DocumentError) and lost.kind == "memory"
    said = f"{lost.kind}" if isinstance(lost, DocumentError) else f"{type(lost).__name__}"
    checks.note(
        "memory runs out" + ("" if is_real else " (injected)"),
        is_right,
        f"the large page ends as {said}, 3 others and a later one are answered",
    )


def check_injected_death(checks: Checks, engine: TransformersEngine, load: Workload) -> None:
    """Inject a CUDA error into a pass: every request under way and every later one ends with EngineDead."""
    compute = generate.compute_pass

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered (injected)")

    generate.compute_pass = fail
    try:
        outcomes = ask_all(engine, [load.build_request(key, 1) for key in range(2)])
    finally:
        generate.compute_pass = compute
    outcomes += ask_all(engine, [load.build_request(7, 1)])
    checks.note(
        "an injected CUDA error", all(isinstance(one, EngineDead) for one in outcomes), "requests under way and later ones: EngineDead"
    )


# ---- Command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Print the table and the checks; return 1 when a check fails or a target is missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="a model of 2 million weights, for a CPU")
    parser.add_argument("--pages", type=int, help="pages of each line of the table")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes of the table")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here, and use it if it is there")
    given = parser.parse_args()
    shape = {**MODELS["small" if given.small else "7b"], **({"batches": given.batches} if given.batches else {})}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not given.small:
        parser.error("there is no GPU that torch can use: add --small")
    with tempfile.TemporaryDirectory(prefix="pipeline-gpu-") as made:
        folder = given.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").is_file():
            started = time.perf_counter()
            write_checkpoint(folder, shape)
            print(
                f"checkpoint: {sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s"
            )
        return run_benchmark(folder, shape, device, given.pages or shape["pages"], given.engines)


def run_benchmark(folder: Path, shape: dict[str, Any], device: torch.device, pages: int, engines: Sequence[str]) -> int:
    """Measure, check, and return the exit code."""
    load, checks, results = Workload.build(shape), Checks(), list[Result]()
    config = json.loads((folder / "config.json").read_text())
    assert checkpoint.load_config(folder, None)  # as both engines read it
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peaks = measure_peaks(device)
    print(
        f"{name}: {peaks[0]:.3g} TFLOP/s, {peaks[1]:.3g} TB/s; a page is {load.page_tokens} visual tokens, an answer {load.answer_tokens}"
    )
    print("bound: 1 / (work of a page / peak TFLOP/s + answer tokens x weights, keys and values read in a step / batch / peak bandwidth)")
    print(f"\n{HEADING}")
    has_vllm = "vllm" in engines and find_spec("vllm") is not None
    reference: list[Completion] = []
    free = [load.build_request(3 * 10**6 + key, 1, schema="", max_tokens=16) for key in range(4)]
    if "transformers" in engines:
        for packed in (False, True) if device.type == "cuda" else (False,):
            weights = "int4" if packed else "bf16" if device.type == "cuda" else "fp32"
            engine = load_transformers(folder, max(shape["batches"]), device, packed)
            bound, most = find_bound(config, peaks, device, packed), max(shape["batches"])
            with count_recordings(engine) as recordings:
                for per_request in shape["per_request"]:
                    for batch in shape["batches"]:
                        is_compared = engine._replays.is_on and per_request == shape["per_request"][0] and (batch == most or not packed)
                        for is_on in (False, True) if is_compared else (True,):
                            engine._batch_size = batch
                            with switch_graphs(engine, is_on):
                                results.append(measure(engine, weights, batch, per_request, pages, load, bound))
                            print(results[-1].format(), flush=True)
            if recordings:
                spent = f"{len(recordings)} captured in {sum(recordings):.1f} s, {engine._replays.replays} steps replayed"
                print(f"  graphs ({weights}): {spent}; {torch.cuda.memory_reserved() / 1e9:.2f} GB reserved")
            for is_on in (False, True) if engine._replays.is_on else (True,):
                with switch_graphs(engine, is_on), time_steps(engine) as times:
                    raise_failures(ask_all(engine, [load.build_request(key, shape["per_request"][-1]) for key in range(most)]))
                graphs = f", graphs {'on' if engine._replays.is_on and is_on else 'off'}" if device.type == "cuda" else ""
                print(f"  step times ({weights}, batch {engine._batch_size}{graphs}): {times.format()}")
            check_graphs(checks, engine, load, packed)
            if not packed:
                reference = raise_failures(ask_all(engine, free))
                check_answers(checks, engine, load, shape["per_request"][-1])
                check_memory_recovery(checks, engine, load)
                check_injected_death(checks, engine, load)
            engine.close()
        check_packed_layers(checks, folder, device)
    if has_vllm:
        for per_request in shape["per_request"]:
            engine = load_vllm(folder, max(shape["batches"]), per_request, shape, device)
            results.append(
                measure(engine, "int4", max(shape["batches"]), per_request, pages, load, find_bound(config, peaks, device, True))
            )
            print(results[-1].format(), flush=True)
            if per_request == 1:
                check_answers(checks, engine, load, 1)
                with leave_out_grammar(engine):
                    unmasked = raise_failures(ask_all(engine, free))
                same, worst = compare_logprobs(reference, unmasked) if reference else (0, 0.0)
                is_close = bool(same) and worst < 0.5  # bfloat16 against bfloat16, on a CPU float32
                found = f"{same} of {16 * len(free)} tokens alike, log-probabilities within {worst:.4f}"
                checks.note("log-probabilities of vllm and transformers", is_close if reference else None, found)
            engine.close()
    elif "vllm" in engines:
        checks.note("vllm", None, "not installed")
    for engine_name, target in TARGETS.items():
        best = max((result.pages_per_s for result in results if result.engine == engine_name), default=None)
        is_judged = best is not None and any(key in name for key in ("H100", "H200"))
        if best is not None:
            checks.note(
                f"{engine_name}: {target:g} pages/s", best >= target if is_judged else None, f"{best:.2f} pages/s at best on {name}"
            )
    print("FAILED" if checks.failed else "passed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
