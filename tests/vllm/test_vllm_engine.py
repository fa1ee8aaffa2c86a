"""The engine `vllm`: its arguments, its pages, its answers, and a run whose engine core is killed.

The tests that all engines share are in `tests/engines/test_contract.py`. Here the model is the demonstration model, in the AWQ layout of
hub checkpoints. Tests that need no vLLM run without it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cluster, engines, flow
from pipeline.budget import PixelBudget, compute_area_bounds, fit_image
from pipeline.demo import evaluate, samples
from pipeline.engines import Engine, checkpoint
from pipeline.engines.model_files import DEMO_CHECKPOINT
from pipeline.engines.vllm import TokenWindow, VLLMEngine, build_sampling_params, launch
from pipeline.engines.vllm.launch import read_reason_since
from pipeline.errors import DocumentError, JobError, RunError
from pipeline.flow import capacity
from pipeline.flow.ask_pass import compute_requests_per_engine
from pipeline.job import Job
from pipeline.output import Output
from pipeline.output.ledger import LEDGER_SCHEMA
from pipeline.output.shards import read_shards
from pipeline.records import Completion, Pixels, Request, Sampling
from pipeline.report import Progress
from pipeline.schema import prompt
from pipeline.stages.ask import AskStage
from pipeline.stages.render import RenderPlan, RenderStage
from tests.support.stages import claim_all, render_rows
from tests.support.workspace import Workspace, make_listing_row

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports cause many, none of them by this package
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
ROOT = Path(__file__).parents[2]
SMALL = ("model.engine=vllm", "model.enforce_eager=true", "model.max_num_seqs=16", "model.engine_args={kv_cache_memory_bytes: 1073741824}")
"""Settings for little memory and a short start."""
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # vLLM's start on a CPU would compile for a minute; Ray's workers inherit it


def make_vllm_job(workspace: Workspace, *settings: str) -> Job:
    return workspace.job("model.engine=vllm", *settings)


# The job's settings


def test_the_jobs_keys_become_vllms_arguments(workspace: Workspace) -> None:
    said = launch.collect_arguments(
        make_vllm_job(workspace, "model.tensor_parallel_size=2", "model.kv_cache_dtype=fp8", "model.engine_args={block_size: 16}")
    )
    assert {"tensor_parallel_size": 2, "kv_cache_dtype": "fp8", "block_size": 16, "max_num_seqs": 64}.items() <= said.items()


def test_keys_that_a_job_does_not_set_are_left_to_vllm(workspace: Workspace) -> None:
    assert not {"quantization", "gpu_memory_utilization", "max_model_len"} & launch.collect_arguments(make_vllm_job(workspace)).keys()


def test_log_probabilities_are_computed_only_where_the_job_keeps_them() -> None:
    pytest.importorskip("vllm")
    request = Request("k", (), "", Sampling())
    assert [build_sampling_params(request, wanted).logprobs for wanted in (True, False)] == [0, None]


def test_the_limit_of_images_is_the_number_of_a_requests_pages(workspace: Workspace) -> None:
    by_page = launch.collect_arguments(make_vllm_job(workspace, "extract.per=page"))["limit_mm_per_prompt"]
    by_document = launch.collect_arguments(make_vllm_job(workspace, "pages.per_request=3"))["limit_mm_per_prompt"]
    rereading = launch.collect_arguments(make_vllm_job(workspace, "evidence.model=on"))["limit_mm_per_prompt"]
    assert rereading["image"] == 8
    assert (by_page, by_document) == ({"image": 1, "video": 0}, {"image": 3, "video": 0})
    with pytest.raises(JobError, match=r"model\.limit_mm_per_prompt allows 2 images, but a request has up to 3"):
        make_vllm_job(workspace, "pages.per_request=3", "model.limit_mm_per_prompt={image: 2}")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model: other", "engine_args: model is set by model.name"),
        ("dtype: half", "engine_args: dtype is set by model.dtype"),
        ("enable_lora: true", "engine_args: enable_lora is set by model.lora"),
        ("trust_remote_code: true", "engine_args cannot change trust_remote_code: no code that comes with a checkpoint is run"),
        ("load_format: pt", "engine_args cannot change load_format: only safetensors are read"),
        ("hf_token: hf_x", "engine_args cannot change hf_token: job.yaml shows it"),
    ],
)
def test_arguments_that_a_job_must_not_set_are_refused(workspace: Workspace, argument: str, said: str) -> None:
    with pytest.raises(JobError, match=said.replace(".", r"\.")):
        make_vllm_job(workspace, f"model.engine_args={{{argument}}}")


def test_what_may_change_an_answer_changes_the_fingerprint_and_nothing_else(workspace: Workspace) -> None:
    plain = make_vllm_job(workspace).fingerprint
    same = ("model.tensor_parallel_size=2", "model.max_num_seqs=9", "model.enforce_eager=true", "model.enable_prefix_caching=false")
    other = ("model.quantization=awq", "model.kv_cache_dtype=fp8", "model.engine_args={block_size: 16}", "model.engine=transformers")
    assert {make_vllm_job(workspace, setting).fingerprint for setting in same} == {plain}
    assert len({make_vllm_job(workspace, setting).fingerprint for setting in other} | {plain}) == 5


def test_vllms_keys_do_not_change_the_fingerprint_of_other_engines(workspace: Workspace) -> None:
    assert (
        workspace.job("model.kv_cache_dtype=fp8").fingerprint
        == workspace.job().fingerprint
        == workspace.job("model.engine=transformers").fingerprint
    )


def test_without_vllm_the_message_says_how_to_install_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"model\.engine is vllm, which needs the package vllm: pip install 'pipeline-documents\[vllm\]'"):
        engines.check_engine(make_vllm_job(workspace))


@pytest.mark.parametrize(("parallel", "each"), [((1, 1), 0.5), ((2, 1), 2.0), ((2, 2), 4.0)])
def test_an_actor_reserves_the_gpus_of_its_model(workspace: Workspace, parallel: tuple[int, int], each: float) -> None:
    tensor, pipeline = parallel
    sizes = (f"model.tensor_parallel_size={tensor}", f"model.pipeline_parallel_size={pipeline}", "ray.gpus_per_actor=0.5")
    assert capacity.compute_actor_gpus(make_vllm_job(workspace, *sizes), cluster.Resources(16, 8)) == each
    assert capacity.compute_actor_gpus(make_vllm_job(workspace, *sizes), cluster.Resources(16, 0)) == 0


def test_models_that_need_more_gpus_than_there_are_are_refused(workspace: Workspace) -> None:
    job = make_vllm_job(workspace, "model.tensor_parallel_size=4", "ray.actors=2")
    enough, too_few = cluster.Resources(16, 8), cluster.Resources(16, 7)
    capacity.check_capacity(job, enough, capacity.compute_reservations(job, enough))
    with pytest.raises(JobError, match="each with 1 CPUs and 4 GPUs"):
        capacity.check_capacity(job, too_few, capacity.compute_reservations(job, too_few))


def test_an_actor_gets_twice_as_many_requests_as_vllm_runs_at_once(workspace: Workspace) -> None:
    assert compute_requests_per_engine(make_vllm_job(workspace, "model.max_num_seqs=100")) == 200


def test_the_reason_is_found_among_general_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_log_file", lambda: tmp_path / "errors.log")
    (tmp_path / "errors.log").write_text("ValueError: of an earlier engine\n")
    length = (tmp_path / "errors.log").stat().st_size
    assert read_reason_since(length) == ""
    with (tmp_path / "errors.log").open("a") as log:
        log.write("WorkerProc failed.\nTraceback …\nRuntimeError: cancelled\ntorch.OutOfMemoryError: 9 GiB are missing\n")
        log.write("Engine failed.\nRuntimeError: Engine core initialization failed. See above.\n")
    assert read_reason_since(length) == "OutOfMemoryError: 9 GiB are missing"


def test_processes_of_a_start_end_with_the_process_that_started_them() -> None:
    child, starting = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,)), Future[None]()

    def begin() -> Future[None]:
        child.start()
        Timer(launch.WATCH_PERIOD_S * 3, starting.set_result, (None,)).start()
        return starting

    _, killer = launch.start_with_killer(begin)
    assert child.is_alive()
    killer.shell.communicate()  # closes the pipe, as the death of this process would
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


# Pages

BUDGETS = (PixelBudget(), PixelBudget(784, 90_000), PixelBudget(1, 10**6, 280, 430))


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([PixelBudget(), PixelBudget(784, 90_000), PixelBudget(1, 10**6, 280, 430)])
)
def test_within_the_bounds_an_image_processor_leaves_every_page_as_it_is(width: int, height: int, budget: PixelBudget) -> None:
    size, (low, high) = fit_image(width, height, budget), compute_area_bounds(budget)
    resized = import_smart_resize()(size.height_px, size.width_px, factor=28, min_pixels=low, max_pixels=high)
    assert resized == (size.height_px, size.width_px)


def import_smart_resize() -> Any:
    """Return the image processor's own `smart_resize`."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    return smart_resize


def test_with_the_budgets_bounds_the_image_processor_changes_no_pixel(workspace: Workspace) -> None:
    images = checkpoint.load_processor(DEMO_CHECKPOINT).image_processor
    page = make_noise_page(448, 476)
    said = launch.collect_arguments(make_vllm_job(workspace))["mm_processor_kwargs"]
    told, kept = images(images=[page], return_tensors="np", **said), images(images=[page], return_tensors="np", do_resize=False)
    assert told["image_grid_thw"].tolist() == [[1, 32, 34]]
    assert np.array_equal(told["pixel_values"], kept["pixel_values"])


def make_noise_page(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# vLLM's configuration


def build_vllm_config(workspace: Workspace, rope_scaling: dict[str, Any] | None = None, **given: Any) -> Any:
    """Return vLLM's own configuration."""
    job = make_vllm_job(workspace, *SMALL[1:])
    launch.prepare_environment(1)
    config = checkpoint.load_config(DEMO_CHECKPOINT, rope_scaling)
    return launch.build_engine_arguments(
        DEMO_CHECKPOINT, config, bool(rope_scaling), None, launch.collect_arguments(job) | given
    ).create_engine_config()


@needs_vllm
def test_vllm_chooses_how_to_run_quantised_weights_and_decodes_by_guidance(workspace: Workspace) -> None:
    found = build_vllm_config(workspace)
    assert "awq" in found.model_config.quantization
    structure = found.structured_outputs_config
    assert (structure.backend, structure.disable_any_whitespace) == ("guidance", True)
    assert (found.model_config.logprobs_mode, found.model_config.trust_remote_code) == ("raw_logprobs", False)


@needs_vllm
def test_yarn_reaches_vllm(workspace: Workspace) -> None:
    found = build_vllm_config(workspace, {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32_768}).model_config
    rope = found.hf_text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["mrope_section"], found.max_model_len) == ("yarn", 2.0, [8, 12, 12], 65_536)
    assert (rope["beta_fast"], rope["beta_slow"]) == (128, 4)  # over a table of four times the trained length


@needs_vllm
def test_an_argument_that_vllm_does_not_know_is_refused_with_the_nearest(workspace: Workspace) -> None:
    with pytest.raises(JobError, match=r"model\.engine_args: the engine of this vLLM has no argument blok_size; did you mean 'block_size'"):
        engines.check_engine(make_vllm_job(workspace, "model.engine_args={blok_size: 16}"))


@needs_vllm
def test_checking_arguments_prints_nothing(workspace: Workspace) -> None:
    code = (
        "import sys; from pipeline import Job; from pipeline.engines import check_engine; check_engine(Job.load(sys.argv[1], sys.argv[2:]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(workspace.file), "model.engine=vllm", "model.engine_args={block_size: 16}"]
    looked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (looked.stdout, looked.stderr) == ("", "")


@needs_vllm
def test_a_failed_start_shows_vllms_reason(workspace: Workspace) -> None:
    job = make_vllm_job(workspace, *SMALL[1:3], "model.engine_args={kv_cache_memory_bytes: 1048576}")
    with pytest.raises(RunError, match=r"vLLM does not start: ValueError: .*`max_model_len`"):
        engines.load_engine(engines.resolve_engine(job, 0), threads=1)
    gc.collect()  # warnings about files that vLLM left open appear here, not after the last test


# Answers


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    job = Workspace(tmp_path_factory.mktemp("workspace")).job(*SMALL, "model.max_model_len=4096")
    one = engines.load_engine(job, threads=1)
    assert isinstance(one, VLLMEngine)
    yield one
    one.close()


def complete_all(engine: Engine, *requests: Request) -> list[Any]:
    """Return each request's completion or exception."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)

    return asyncio.run(gather())


@needs_vllm
def test_a_page_that_would_be_resized_is_refused(engine: Engine) -> None:
    small, whole = (
        Request("k", prompt.build_messages("Read.", [make_noise_page(*size)]), "", Sampling(max_tokens=2))
        for size in ((56, 56), (448, 448))
    )
    failed, answered = complete_all(engine, small, whole)
    assert isinstance(failed, DocumentError)
    assert (failed.kind, "its pages are ['56x56'] px" in str(failed)) == ("pixels", True)
    assert isinstance(answered, Completion)


@needs_vllm
def test_an_answer_that_loops_is_stopped_and_the_loop_named(engine: Engine) -> None:
    endless = '{"type": "string", "pattern": "^(ab!){900}$"}'
    (failed,) = complete_all(
        engine, Request("k", prompt.build_messages("Read.", [make_noise_page(448, 448)]), endless, Sampling(max_tokens=3000))
    )
    assert (failed.kind, "'ab!'" in str(failed) or "'b!a'" in str(failed)) == ("loop", True)
    assert "was stopped after 5" in str(failed)


@needs_vllm
def test_log_probabilities_are_relative_to_the_allowed_tokens(engine: Engine) -> None:
    (answer,) = complete_all(
        engine, Request("k", prompt.build_messages("Read.", [make_noise_page(448, 448)]), '{"enum": ["ab"]}', Sampling(max_tokens=9))
    )
    assert answer.text == '"ab"'
    assert sum(token.logprob for token in answer.tokens) == pytest.approx(0.0, abs=1e-3)


@needs_vllm
def test_it_reads_as_well_as_the_transformers_engine(engine: Engine, tmp_path: Path) -> None:
    drawn = [one for one in samples.draw_documents(evaluate.plan_documents(40), evaluate.EVALUATION_SEED) if one.form == "invoice"]
    samples.write_documents(drawn, tmp_path)
    job = Job.load(ROOT / "jobs" / "invoices.yaml", ["model.name=demo", *SMALL])
    plain = engines.load_engine(job.with_model(engine="transformers"), threads=1)
    mine, theirs = (read_with_engine(job, one, tmp_path / "invoices", drawn) for one in (engine, plain))
    plain.close()
    right = [sum(leaf.is_right for verdict in verdicts for leaf in verdict.leaves) for verdicts in (mine, theirs)]
    every = sum(len(verdict.leaves) for verdict in theirs)
    print(f"exactly right of {every} values: {right[0]} by vLLM, {right[1]} by transformers")
    assert right[1] > every / 2
    assert right[0] >= right[1] - 0.01 * every


def read_with_engine(job: Job, engine: Engine, folder: Path, drawn: Sequence[samples.DrawnDocument]) -> list[evaluate.Verdict]:
    """Return the verdicts on these documents, read by an engine without Ray."""
    render = RenderStage(replace(RenderPlan.of_job(job), root=folder, per_request=4), claim_all)
    rows = list(render_rows(render, (make_listing_row(folder / one.name, folder) for one in drawn)))
    render.close()
    stage = AskStage(job, engine)

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(stage.answer_row, rows))

    answers = {row["source"]: row for row in asyncio.run(gather())}
    return [judge_answer(one, answers[one.name]) for one in drawn]


def judge_answer(one: samples.DrawnDocument, row: dict[str, Any]) -> evaluate.Verdict:
    """Compare an answer with its document's truth."""
    valid = row["status"] == "extracted"
    record = {**json.loads(row["answer"]), "_failure": None} if valid else {"_failure": row["failure"]}
    return evaluate.judge_record(one, record)


# What waits


def test_requests_are_let_through_in_their_order_while_there_is_room() -> None:
    async def pass_through() -> str:
        window, passed = TokenWindow(10), list[str]()

        async def ask(name: str, tokens: int) -> None:
            await window.enter(tokens)
            passed.append(name)

        waiting = {name: asyncio.ensure_future(ask(name, tokens)) for name, tokens in zip("abcde", (99, 6, 6, 1, 2), strict=True)}
        for left in (99, 6):
            await asyncio.sleep(0.01)
            passed.append("|")
            window.leave(left)
        await asyncio.gather(*waiting.values())
        assert window.within == 6 + 1 + 2
        return "".join(passed)

    assert asyncio.run(pass_through()) == "a|b|cde"


def test_a_request_that_is_cancelled_while_it_waits_takes_no_room() -> None:
    async def leave_early() -> int:
        window = TokenWindow(10)
        await window.enter(8)
        large, small = (asyncio.ensure_future(window.enter(tokens)) for tokens in (9, 2))
        await asyncio.sleep(0.01)
        large.cancel()
        await small  # which only the large one was holding up
        return window.within

    assert asyncio.run(leave_early()) == 10


@needs_vllm
def test_pages_that_wait_take_little_more_than_their_pixels(engine: VLLMEngine) -> None:
    """vLLM is stopped meanwhile: what it has been sent stays as large as it is."""
    cores = [child.pid for child in multiprocessing.active_children() if child.pid]
    room, engine._window.most = engine._window.most, 2048

    async def measure() -> float:
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        pages = [make_noise_page(448, 448) for _ in range(120)]
        requests = [Request(str(at), prompt.build_messages("Read.", [page]), "", Sampling(max_tokens=1)) for at, page in enumerate(pages)]
        asked = [asyncio.ensure_future(engine.complete(one)) for one in requests]
        while engine._window.within + sum(tokens for tokens, _ in engine._window._waiting) < 120 * 256:
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)  # the last patches are made in another thread
        held = (tracemalloc.get_traced_memory()[0] - before) / sum(page.nbytes for page in pages)
        tracemalloc.stop()
        for pid in cores:
            os.kill(pid, signal.SIGCONT)
        assert all(one.usage.completion_tokens == 1 for one in await asyncio.gather(*asked))
        return held

    try:
        for pid in cores:
            os.kill(pid, signal.SIGSTOP)
        assert 1.0 < asyncio.run(measure()) <= 1.3
    finally:
        engine._window.most = room
        for pid in cores:
            os.kill(pid, signal.SIGCONT)


# A run


class Killer:
    """Kills the core process of an engine once, after a few requests are done."""

    def __init__(self) -> None:
        self.killed: list[int] = []

    def __call__(self, progress: Progress) -> None:
        if progress.requests_done < 3 or self.killed:
            return
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "EngineCore" in " ".join(child.cmdline()):
                    child.kill()
                    self.killed.append(child.pid)


@needs_vllm
def test_a_run_whose_engine_core_is_killed_finishes_and_loses_nothing(tmp_path: Path) -> None:
    drawn = [one for one in samples.draw_documents(evaluate.plan_documents(40), evaluate.EVALUATION_SEED) if one.form == "invoice"]
    samples.write_documents(drawn, tmp_path)
    source = f"source.paths={json.dumps([str(tmp_path / 'invoices')])}"
    few = ("model.max_num_seqs=4", "model.max_model_len=4096")
    job = Job.load(ROOT / "jobs" / "invoices.yaml", [source, "model.name=demo", *SMALL, *few], tmp_path / "out")
    killer = Killer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = flow.run(job, on_progress=killer)
    ledger = read_shards(Output(job.output).requests, None, LEDGER_SCHEMA).to_pylist()
    assert killer.killed
    assert (report.documents, report.statuses) == (len(drawn), {"extracted": len(drawn)})
    assert sorted(Path(row["source"]).name for row in ledger) == sorted(one.name for one in drawn)
    assert {row["engine"] for row in ledger} == {"vllm"}
