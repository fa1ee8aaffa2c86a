"""Chat Completions server on loopback with scripted replies, right and wrong ones; it records its requests.

The faults of hosted servers cannot be arranged with a real one. Every request is validated against the JSON Schema of requests;
`complaints` lists the violations.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, takewhile
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO, Any, Self

import httpx2
from jsonschema import Draft202012Validator

REQUEST = Draft202012Validator(json.loads((Path(__file__).parent / "chat_completions_request.schema.json").read_text()))
GREETING = "Say hello."
STALL_S = 60.0
"""Longer than any test waits; the end of a test ends it sooner."""
Body = dict[str, Any]


class Connection(BaseHTTPRequestHandler):
    """One connection to the stub."""

    protocol_version = "HTTP/1.1"
    stub: ChatServer

    def do_GET(self) -> None:
        self.stub.headers.append(dict(self.headers))
        if self.stub.is_unauthorized(self.headers):
            self.reply(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif self.path == "/v1/models" and self.stub.models is not None:
            self.reply(200, {"object": "list", "data": [{"id": name, "owned_by": self.stub.owner} for name in self.stub.models]})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.choose_reply(self, body)(self, body)

    def reply(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self.send_chunk(f"data: {text}\n\n".encode())

    def send_chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


Reply = Callable[[Connection, Body], None]


class ChatServer:
    """The server. `obeys` and `refuses` name ways to ask for structure; one in neither is accepted and ignored.

    The replies are given in their order, the last one for ever.
    """

    def __init__(
        self, *replies: Reply, models: Sequence[str] | None = ("stub-1",), owner: str = "stub", key: str | None = None,
        obeys: Sequence[str] = ("json_schema", "tool"), refuses: Sequence[str] = (), most_tokens: int = 16_384,
    ) -> None:  # fmt: skip
        self.replies, self.models, self.owner, self.key, self.obeys, self.refuses = list(replies), models, owner, key, obeys, refuses
        self.most_tokens = most_tokens
        self.requests, self.complaints, self.headers = list[Body](), list[str](), list[dict[str, str]]()
        self.closed, self.client_left, self._turn = Event(), Event(), Lock()
        handler = type("Connection", (Connection,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    def is_unauthorized(self, headers: Mapping[str, str]) -> bool:
        return self.key is not None and headers["Authorization"] != f"Bearer {self.key}"

    def count_prompt_tokens(self, body: Body) -> int:
        """Return how many tokens a prompt has; of these servers only vLLM counts its pages."""
        return 300 if self.owner != "vllm" else 300 + count_visual_tokens(body, self.most_tokens)

    def choose_reply(self, connection: Connection, body: Body) -> Reply:
        """Record a request and return the reply to it."""
        with self._turn:
            self.complaints += [f"{error.json_path}: {error.message[:200]}" for error in REQUEST.iter_errors(body)]
            self.requests.append(body)
            self.headers.append(dict(connection.headers))
            way = find_structure(body)
            if self.is_unauthorized(connection.headers):
                return reply_status(401, "no such key")
            if refused := [name for name in (way, *body) if name in self.refuses]:
                return reply_status(400, f"{refused[0]} is not supported")
            if body["messages"][-1]["content"] == GREETING:
                return reply_text('{"word": "k3v9"}' if way in self.obeys else "Hello!")
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def find_structure(body: Body) -> str:
    """Return how a request asks for structure."""
    return "json_schema" if "response_format" in body else "tool" if "tools" in body else "prompt"


def split_into_deltas(body: Body, text: str) -> list[Body]:
    """Return the deltas that write a text, as content or as the arguments of a tool call."""
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    if "tools" not in body:
        return [{"content": part} for part in parts]
    name = [{"index": 0, "id": "call-1", "type": "function", "function": {"name": "record", "arguments": ""}}]
    return [{"tool_calls": name}, *({"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts)]


def make_usage(text: str, read: int = 300) -> Body:
    return {"prompt_tokens": read, "completion_tokens": len(text), "total_tokens": read + len(text)}


def count_visual_tokens(body: Body, most: int = 16_384) -> int:
    """Return how many visual tokens a request's pages are, each shrunk to so many at most."""
    urls = [part["image_url"]["url"] for turn in body["messages"] for part in turn["content"] if "image_url" in part]
    sizes = [struct.unpack(">II", base64.b64decode(url.partition(",")[2])[16:24]) for url in urls]  # where a PNG has them
    return sum(min(most, width * height // 784) for width, height in sizes)


def reply_text(text: str, finish_reason: str | None = None, tail: Callable[[Connection], None] = Connection.end_stream) -> Reply:
    """Answer with a text, streamed as hosted servers do it: a role first, then pieces, the reason, the usage."""

    def reply(connection: Connection, body: Body) -> None:
        reason = finish_reason or ("tool_calls" if "tools" in body else "stop")
        connection.begin_stream()
        for delta in ({"role": "assistant", "content": ""}, *split_into_deltas(body, text)):
            scores = (
                [{"token": delta["content"], "logprob": -0.5, "bytes": list(delta["content"].encode())}] if delta.get("content") else []
            )
            scored = {"logprobs": {"content": scores}} if body.get("logprobs") and scores else {}
            connection.send_event(
                {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None, **scored}]}
            )
        if tail is Connection.end_stream:
            connection.send_event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
            connection.send_event({"choices": [], "usage": make_usage(text, connection.stub.count_prompt_tokens(body))})
            connection.send_event("[DONE]")
        tail(connection)

    return reply


def reply_unstreamed(text: str) -> Reply:
    """Answer without streaming, although a stream was asked for."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return lambda connection, _: connection.reply(200, {"object": "chat.completion", "choices": [choice], "usage": make_usage(text)})


def reply_status(code: int, message: str = "not now", **headers: str) -> Reply:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda connection, _: connection.reply(code, {"error": {"message": message, "code": code}}, named)


def reply_events(*events: Any) -> Reply:
    """Send these events and end."""

    def reply(connection: Connection, _: Body) -> None:
        connection.begin_stream()
        for event in events:
            connection.send_event(event)
        connection.end_stream()

    return reply


def drop_connection(connection: Connection, _: Body) -> None:
    """Close the connection without an answer."""
    connection.drop()


def stall(connection: Connection) -> None:
    """Send nothing more and keep the connection open."""
    connection.stub.closed.wait(STALL_S)


def reply_endlessly(*parts: str, scored: bool = False) -> Reply:
    """Stream these parts, the last one again and again, until the client leaves; without parts, count."""

    def reply(connection: Connection, _: Body) -> None:
        connection.begin_stream()
        try:
            for number in takewhile(lambda _: not connection.stub.closed.is_set(), count()):
                part = parts[min(number, len(parts) - 1)] if parts else f"{number} "
                scores = {"logprobs": {"content": [{"token": part, "logprob": -0.5}]}} if scored else {}
                connection.send_event({"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None, **scores}]})
        except OSError:
            connection.close_connection = True
            connection.stub.client_left.set()

    return reply


@contextmanager
def serve_chat(*command: str, **environment: str) -> Iterator[str]:
    """Start a real server on a port of its own and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (*command, "--host", "127.0.0.1", "--port", str(port))
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment) as process:
        try:
            wait_for_server(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_for_server(address: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Return once a server answers."""
    while process.poll() is None:
        try:
            httpx2.get(address)
            return
        except httpx2.TransportError:
            time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"the server ended: {log.read()[-2000:].decode(errors='replace')}")
