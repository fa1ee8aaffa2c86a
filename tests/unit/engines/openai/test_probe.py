"""The server probe: what it finds out about a server, and what it does not ask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from pipeline import engines
from pipeline.errors import JobError
from tests.support.chat_server import Body, ChatServer, Connection, Reply, count_visual_tokens, reply_events, reply_status, reply_text
from tests.support.engines import VALID
from tests.support.openai_requests import (
    make_openai_job,
)
from tests.support.workspace import Workspace


@pytest.mark.parametrize(
    ("obeys", "refuses", "way"),
    [
        (("json_schema", "tool"), (), "json_schema"),
        (("tool",), (), "tool"),
        (("tool",), ("json_schema",), "tool"),
        ((), ("tool",), "prompt"),
        ((), (), "prompt"),
        ((), ("json_schema", "tool", "logprobs"), "prompt"),
    ],
)
def test_the_structure_that_a_server_obeys_is_found(workspace: Workspace, obeys: Sequence[str], refuses: Sequence[str], way: str) -> None:
    with ChatServer(reply_text(VALID), obeys=obeys, refuses=refuses) as stub:
        found = engines.resolve_engine(make_openai_job(workspace, stub), 0.0).sections.model
    assert (found.name, found.server, found.structure, found.logprobs) == ("stub-1", "other", way, "logprobs" not in refuses)
    assert stub.complaints == []


@pytest.mark.parametrize(
    "refuse", [reply_status(400, "'format' is not permitted"), reply_events({"error": {"message": "no", "code": 400}}, "[DONE]")]
)
def test_a_structure_in_which_the_jobs_schema_is_refused_is_not_chosen(workspace: Workspace, refuse: Reply) -> None:
    def picky(connection: Connection, asked: Body) -> None:
        (refuse if "response_format" in asked else reply_text(VALID))(connection, asked)

    with ChatServer(picky) as stub:
        assert engines.resolve_engine(make_openai_job(workspace, stub), 0.0).sections.model.structure == "tool"


def test_vllm_is_recognized_by_its_list_of_models(workspace: Workspace) -> None:
    with ChatServer(reply_text(VALID), owner="vllm") as stub:
        assert engines.resolve_engine(make_openai_job(workspace, stub), 0.0).sections.model.server == "vllm"
    assert [count_visual_tokens(asked) for asked in stub.requests[-2:]] == [256, 1280]


def test_a_vllm_that_resizes_pages_stops_the_job(workspace: Workspace) -> None:
    said = r"resizes pages: pages of \d+x\d+ and \d+x\d+ px should differ by 1,024 tokens and differ by 744"
    with ChatServer(reply_text(VALID), owner="vllm", most_tokens=1000) as stub, pytest.raises(JobError, match=said):
        engines.resolve_engine(make_openai_job(workspace, stub), 0.0)


def test_page_sizes_are_not_probed_when_all_are_equal(workspace: Workspace) -> None:
    with ChatServer(reply_text(VALID), owner="vllm") as stub:
        engines.resolve_engine(make_openai_job(workspace, stub, "pages.resized_height=280", "pages.resized_width=430"), 0.0)
    assert count_visual_tokens(stub.requests[-1]) == 4


def test_a_resolved_job_is_not_probed_again(workspace: Workspace) -> None:
    with ChatServer(reply_text(VALID)) as stub:
        chosen = engines.resolve_engine(make_openai_job(workspace, stub), 0.0)
        asked = len(stub.requests)
        with closing(engines.load_engine(engines.resolve_engine(chosen, 0.0))) as engine:
            assert (engine.name, engine.model, len(stub.requests)) == ("openai", "stub-1", asked)


def test_what_the_job_sets_is_not_probed(workspace: Workspace) -> None:
    with ChatServer(reply_text(VALID), models=None) as stub:
        said = make_openai_job(workspace, stub, "model.name=mine", "model.structure=tool", "model.server=other", "model.logprobs=false")
        assert engines.resolve_engine(said, 0.0) is said
    assert stub.requests == []


def test_a_server_may_have_no_list_of_models(workspace: Workspace) -> None:
    with ChatServer(reply_text(VALID), models=None) as stub:
        engines.check_engine(make_openai_job(workspace, stub))
        assert engines.resolve_engine(make_openai_job(workspace, stub, "model.name=demo"), 0.0).sections.model.name == "demo"
        with pytest.raises(JobError, match=r"it lists no model: say which one in model\.name"):
            engines.resolve_engine(make_openai_job(workspace, stub), 0.0)


def test_of_several_models_the_job_must_name_one(workspace: Workspace) -> None:
    with (
        ChatServer(reply_text(VALID), models=["a", "b"]) as stub,
        pytest.raises(JobError, match=r"it lists 2 models \(a, b\): say which one"),
    ):
        engines.resolve_engine(make_openai_job(workspace, stub), 0.0)


def test_a_server_that_refuses_everything_stops_the_job(workspace: Workspace) -> None:
    said = r"base_url http://127.* it refuses every request: the server answers 400: top_k is unknown"
    with ChatServer(reply_status(400, "top_k is unknown"), refuses=["json_schema", "tool"]) as stub, pytest.raises(JobError, match=said):
        engines.resolve_engine(make_openai_job(workspace, stub), 0.0)


def test_an_unreachable_server_stops_the_job(workspace: Workspace, closed_address: str) -> None:
    for look in (engines.check_engine, lambda given: engines.resolve_engine(given, 0.0)):
        with pytest.raises(JobError, match=r"job\.yaml: model\.base_url http://127\.0\.0\.1:\d+/v1: .* cannot be reached"):
            look(make_openai_job(workspace, closed_address))


def test_choosing_a_server_loads_no_model_library(workspace: Workspace) -> None:
    settings = ["model.engine=openai", "model.structure=tool", "model.server=other", "model.logprobs=true", "model.name=m"]
    code = (
        "import sys; from pipeline import Job, engines\n"
        "engines.load_engine(engines.resolve_engine(Job.load(sys.argv[1], sys.argv[2:]), 0)); print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(workspace.file), *settings, "model.base_url=http://127.0.0.1:1/v1"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4])
    assert not {"torch", "transformers", "ray"} & set(loaded.stdout.split())
