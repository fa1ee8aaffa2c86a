"""A run whose engine is a Chat Completions server that fails often."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from pipeline import flow
from tests.support.chat_server import Body, ChatServer, Connection, drop_connection, reply_events, reply_status, reply_text, stall
from tests.support.engines import VALID
from tests.support.workspace import Workspace, draw_slip


def test_a_run_outlasts_a_server_that_fails_thirty_percent_in_six_ways(workspace: Workspace, ray_session: object) -> None:
    """Forty documents, one page each: all settle, and the server gives each page one whole answer, of its own."""
    faults = [
        reply_status(429, Retry_After="1"),
        reply_status(500),
        drop_connection,
        reply_text(VALID, tail=Connection.drop),
        reply_text(VALID[:9], tail=stall),
        reply_events("{no"),
    ]
    turn, given = iter(range(10**6)), list[tuple[str, str]]()

    def reply(connection: Connection, body: Body) -> None:
        number, page = next(turn), body["messages"][1]["content"][0]["image_url"]["url"]
        if number % 10 in (0, 4, 7):
            return faults[number // 3 % 6](connection, body)
        given.append((page, json.dumps({"currency": "EUR", "total": number, "lines": []})))
        return reply_text(given[-1][1])(connection, body)

    for number in range(40):
        workspace.put(f"{number}.pdf", draw_slip(number))
    with ChatServer(reply) as stub:
        server = ("model.engine=openai", f"model.base_url={stub.base_url}")
        known = ("model.name=stub-1", "model.structure=json_schema", "model.server=other", "model.logprobs=false")
        report = flow.run(workspace.job(*server, *known, "model.max_retries=12", "model.idle_timeout_s=6"))
    answers = pq.read_table(workspace.folder / "out" / "requests")["answer"].to_pylist()
    assert (report.statuses, report.requests_asked) == ({"extracted": 40}, 40)
    assert sorted(answers) == sorted(answer for _, answer in given)
    assert len({page for page, _ in given}) == len(given) == 40
    assert len(stub.requests) > 50
