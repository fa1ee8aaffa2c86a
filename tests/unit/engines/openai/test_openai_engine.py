"""The engine `openai`: closing, the job's limits, the API key, and what of a job belongs to its fingerprint."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing

import pytest

from pipeline import engines
from pipeline.engines import openai
from pipeline.engines.openai.chat import ServerProfile
from pipeline.errors import DocumentError, EngineDead, JobError
from pipeline.records import Completion
from pipeline.stages.ask import AskStage
from tests.support.chat_server import ChatServer, reply_status, reply_text, stall
from tests.support.engines import VALID
from tests.support.openai_requests import (
    FAST_POLICY,
    KEY,
    complete_all,
    make_openai_job,
    make_request,
)
from tests.support.requests import make_noise
from tests.support.workspace import Workspace

# Closing and limits


def test_requests_of_a_closed_engine_fail() -> None:
    async def close_while_waiting(engine: openai.OpenAIEngine, stub: ChatServer) -> None:
        waiting = asyncio.ensure_future(engine.complete(make_request()))
        while not stub.requests:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(engine.close)
        await waiting

    with ChatServer(reply_text(VALID, tail=stall)) as stub:
        engine = openai.OpenAIEngine(stub.base_url, ServerProfile("m"), FAST_POLICY)
        with pytest.raises(EngineDead, match="closed"):
            asyncio.run(close_while_waiting(engine, stub))
        with pytest.raises(EngineDead, match="closed"):
            asyncio.run(engine.complete(make_request()))


def test_a_request_beyond_the_jobs_limit_is_not_sent() -> None:
    with (
        ChatServer(reply_text(VALID)) as stub,
        closing(openai.OpenAIEngine(stub.base_url, ServerProfile("m"), FAST_POLICY, max_request_tokens=75)) as engine,
    ):
        assert isinstance(asyncio.run(engine.complete(make_request(pages=1, max_tokens=69))), Completion)
        with pytest.raises(DocumentError, match=r"needs more than 76 tokens \(12 for its pages and up to 64 to write\)"):
            asyncio.run(engine.complete(make_request(pages=2)))


# The key


def test_the_key_comes_from_the_environment_and_is_only_sent_to_the_server(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", f" {KEY}\n")
    with ChatServer(reply_text(VALID), key=KEY) as stub:
        given = make_openai_job(workspace, stub, "model.api_key_env=STUB_KEY")
        engines.check_engine(given)
        chosen = engines.resolve_engine(given, 0.0)
        with closing(engines.load_engine(chosen)) as engine:
            assert asyncio.run(engine.complete(make_request())).text == VALID
            assert KEY not in repr(vars(engine)) + repr(vars(vars(engine)["_client"])["_client"].headers)
    assert KEY not in json.dumps([chosen.dump_keys(), chosen.decisive_keys]) + repr(chosen)


def test_a_key_that_a_server_repeats_is_redacted(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", KEY)
    with ChatServer(reply_status(400, f"{KEY} may not do that"), key="another") as stub:
        with pytest.raises(JobError, match=r"answers 401: Incorrect API key: Bearer \*\*\*"):
            engines.check_engine(make_openai_job(workspace, stub, "model.api_key_env=STUB_KEY"))
        stub.key = None
        (error,) = complete_all(stub, [make_request()], key=KEY)
    assert str(error) == "the server answers 400: *** may not do that"


def test_a_missing_key_stops_the_job(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUB_KEY", raising=False)
    with pytest.raises(JobError, match=r"model\.api_key_env names the environment variable STUB_KEY, which is not set"):
        engines.check_engine(make_openai_job(workspace, "http://127.0.0.1:1/v1", "model.api_key_env=STUB_KEY"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (f"model.api_key_env={KEY}", "api_key_env is not the name of an environment variable"),
        (f"model.base_url=https://user:{KEY}@host/v1", "base_url holds a user, a password or a query"),
        (f"model.base_url=https://host/v1?key={KEY}", "base_url holds a user, a password or a query"),
        ("model.base_url=localhost:8000", "base_url is not an http"),
        ("model.base_url=http://host/v1/chat/completions", "base_url ends in /chat/completions: remove that part"),
        ("model.base_url=null", "the engine openai needs base_url"),
        ("model.engine=transformers", "base_url is for the engine openai, and model.engine is transformers"),
        ("model.extra_body={messages: []}", "extra_body cannot change messages"),
    ],
)
def test_a_wrong_address_or_key_is_refused_without_showing_the_key(workspace: Workspace, setting: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as refused:
        make_openai_job(workspace, "http://127.0.0.1:1/v1", setting)
    assert KEY not in str(refused.value).partition(": model: ")[2]


# The job


def test_the_address_is_not_part_of_the_fingerprint(workspace: Workspace) -> None:
    one = make_openai_job(workspace, "http://here/v1", "model.name=m")
    for same in ("base_url=https://there/v1", "api_key_env=K", "concurrency=2", "timeout_s=9", "max_retries=1", "without_gpu=demo"):
        assert make_openai_job(workspace, "http://here/v1", "model.name=m", f"model.{same}").fingerprint == one.fingerprint
    for other in ("name=n", "image_format=jpeg", "extra_body={top_k: 1}", "structure=tool", "server=vllm"):
        assert make_openai_job(workspace, "http://here/v1", "model.name=m", f"model.{other}").fingerprint != one.fingerprint


def test_settling_uses_what_the_run_found_out(workspace: Workspace) -> None:
    with ChatServer(reply_text(VALID)) as stub:
        written = make_openai_job(workspace, stub)
        chosen = engines.resolve_engine(written, 0.0)
    assert written.fingerprint != chosen.fingerprint == written.with_resolved_model(chosen.dump_keys()["model"]).fingerprint


def test_an_invalid_answer_is_asked_for_again_with_its_errors(workspace: Workspace) -> None:
    row = {"key": "k", "first_page": 1, "last_page": 1, "page_count": 1, "pages": [{"page_no": 1, "height_px": 56, "width_px": 84}]}
    with ChatServer(reply_text(VALID)) as stub:
        chosen = engines.resolve_engine(make_openai_job(workspace, stub), 0.0)
        stub.replies = [reply_text(f"```json\n{VALID}\n```"), reply_text(VALID)]
        with closing(engines.load_engine(chosen)) as engine:
            answered = asyncio.run(AskStage(chosen, engine).answer_row({**row, "pixels": [make_noise()]}))
    assert (answered["status"], answered["asks"], answered["prompt_tokens"], answered["engine"]) == ("extracted", 2, 600, "openai")
    assert "That does not satisfy the schema" in stub.requests[-1]["messages"][-1]["content"]
    assert stub.complaints == []
