"""A run whose engine is a Chat Completions server that fails often."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from pipeline import flow
from pipeline.output import Output
from pipeline.output.status import read_status
from pipeline.records import REREAD
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


def test_a_broken_rule_is_asked_again_once_and_never_after(workspace: Workspace, ray_session: object) -> None:
    """Three documents, of which the second answer mends one, leaves one as it is, and is not needed for one."""
    answers = {"0.pdf": (50, 5), "1.pdf": (60, 61), "2.pdf": (7, None)}
    pages = dict[str, str]()

    def reply(connection: Connection, body: Body) -> None:
        is_again = "They break a rule" in body["messages"][-1]["content"][-1]["text"]
        page = body["messages"][-1]["content"][0]["image_url"]["url"]
        name = pages.setdefault(page, f"{len(pages)}.pdf")
        found = {"total": answers[name][is_again]}
        return reply_text(json.dumps(found if is_again else {"currency": "EUR", **found, "lines": []}))(connection, body)

    for number in range(3):
        workspace.put(f"{number}.pdf", draw_slip(number))
    rule = "extract.rules=[{name: cheap, expression: total < 10.0, message: too dear, re_ask: true}]"
    with ChatServer(reply) as stub:
        server = ("model.engine=openai", f"model.base_url={stub.base_url}", "model.name=stub-1", "model.structure=json_schema")
        job = workspace.job(*server, "model.server=other", "model.logprobs=false", rule)
        report = flow.run(job)
        asked = len(stub.requests)
        again = flow.run(job)
        assert (asked, len(stub.requests)) == (5, 5)
    out = workspace.folder / "out"
    ledger = pq.read_table(out / "requests").select(["key", "rule", "completion_tokens"]).to_pylist()
    records = pq.read_table(out / "records").to_pylist()
    assert sorted(row["rule"] or "" for row in ledger) == ["", "", "", "cheap", "cheap"]
    assert len({row["key"] for row in ledger}) == 5
    assert sorted((int(record["total"]), record["_requests"]) for record in records) == [(5, 2), (7, 1), (60, 2)]
    assert sorted(str([found["taken"] for found in record["_asked_again"]]) for record in records) == ["[False]", "[True]", "[]"]
    assert (report.requests_asked, report.rule_requests, report.requests, report.exit_code) == (5, 2, {"extracted": 3}, 0)
    assert report.completion_tokens == sum(row["completion_tokens"] for row in ledger)
    assert (again.requests_asked, again.rule_requests) == (0, 0)
    assert read_status(Output(out))["requests"] == {"extracted": 3}


def test_values_are_read_again_once_and_never_after(workspace: Workspace, ray_session: object) -> None:
    """Three documents whose pages have no words: the reading agrees for one, fails for one, and no place is named for one."""
    totals, pages = {"0.pdf": 50, "1.pdf": 60, "2.pdf": 70}, dict[str, str]()
    readings = iter([reply_text('{"1": "Total 50.00 60.00"}'), reply_status(400, "too many images")])
    place = {"page": 1, "bbox_2d": [100, 100, 200, 120]}

    def reply(connection: Connection, body: Body) -> None:
        content = body["messages"][-1]["content"]
        if content[0].get("text") == "1:":
            return next(readings)(connection, body)
        name = pages.setdefault(content[0]["image_url"]["url"], f"{len(pages)}.pdf")
        if "bbox_2d" in content[-1]["text"]:
            return reply_text(json.dumps({"1": None if name == "2.pdf" else place}))(connection, body)
        return reply_text(json.dumps({"currency": "EUR", "total": totals[name], "lines": []}))(connection, body)

    for number in range(3):
        workspace.put(f"{number}.pdf", draw_slip(number))
    with ChatServer(reply) as stub:
        server = ("model.engine=openai", f"model.base_url={stub.base_url}", "model.name=stub-1", "model.structure=json_schema")
        evidence = ("evidence.text=off", "evidence.model=on", "sampling.max_tokens=400", "model.max_retries=0")
        job = workspace.job(*server, "model.server=other", "model.logprobs=false", *evidence)
        report = flow.run(job)
        asked = len(stub.requests)
        again = flow.run(job)
        assert (asked, len(stub.requests)) == (8, 8)
    out = workspace.folder / "out"
    ledger = pq.read_table(out / "requests").select(["key", "rule", "status", "completion_tokens"]).to_pylist()
    records = pq.read_table(out / "records").to_pylist()
    assert sorted(row["rule"] or "" for row in ledger) == [""] * 3 + [REREAD] * 5
    assert len({row["key"] for row in ledger}) == 8
    matches = [{one["path"]: one["match"] for one in record["_evidence"] or []}.get("$.total") for record in records]
    assert sorted(map(str, matches)) == ["None", "absent", "reread"]
    assert (report.requests_asked, report.reread_requests, report.requests, report.exit_code) == (7, 5, {"extracted": 3}, 0)
    assert report.completion_tokens == sum(row["completion_tokens"] for row in ledger)
    assert (again.requests_asked, again.reread_requests) == (0, 0)
    assert read_status(Output(out))["requests"] == {"extracted": 3}
