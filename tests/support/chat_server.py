"""A Chat Completions server on loopback that answers as it is told, rightly or wrongly, and remembers what it was asked.

What a hosted server does on a bad day could not be arranged with a real one. Every request is held against the request's own
JSON Schema; `complaints` has what it breaks.
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
"""Longer than any test waits; a test's end ends it sooner."""
Body = dict[str, Any]


class Wire(BaseHTTPRequestHandler):
    """One connection to the stub."""

    protocol_version = "HTTP/1.1"
    stub: ChatServer

    def do_GET(self) -> None:
        self.stub.headers.append(dict(self.headers))
        if self.stub.locked(self.headers):
            self.reply(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif self.path == "/v1/models" and self.stub.models is not None:
            self.reply(200, {"object": "list", "data": [{"id": name, "owned_by": self.stub.owner} for name in self.stub.models]})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.asked_by(self, body)(self, body)

    def reply(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self.block(f"data: {text}\n\n".encode())

    def block(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


Say = Callable[[Wire, Body], None]


class ChatServer:
    """The server. `obeys` and `refuses` name ways of structure; what is in neither is taken and ignored."""

    def __init__(
        self, *says: Say, models: Sequence[str] | None = ("stub-1",), owner: str = "stub", key: str | None = None,
        obeys: Sequence[str] = ("json_schema", "tool"), refuses: Sequence[str] = (), most_tokens: int = 16_384,
    ) -> None:  # fmt: skip
        self.says, self.models, self.owner, self.key, self.obeys, self.refuses = list(says), models, owner, key, obeys, refuses
        self.most_tokens = most_tokens
        self.asked, self.complaints, self.headers = list[Body](), list[str](), list[dict[str, str]]()
        self.over, self.left, self._turn = Event(), Event(), Lock()
        wire = type("Wire", (Wire,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), wire)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    def locked(self, headers: Mapping[str, str]) -> bool:
        return self.key is not None and headers["Authorization"] != f"Bearer {self.key}"

    def read(self, body: Body) -> int:
        """Return how many tokens a prompt has; vLLM counts what it sees."""
        return 300 if self.owner != "vllm" else 300 + seen(body, self.most_tokens)

    def asked_by(self, wire: Wire, body: Body) -> Say:
        """Remember a request and return how it is answered."""
        with self._turn:
            self.complaints += [f"{error.json_path}: {error.message[:200]}" for error in REQUEST.iter_errors(body)]
            self.asked.append(body)
            self.headers.append(dict(wire.headers))
            way = way_of(body)
            if self.locked(wire.headers):
                return status(401, "no such key")
            if refused := [name for name in (way, *body) if name in self.refuses]:
                return status(400, f"{refused[0]} is not supported")
            if body["messages"][-1]["content"] == GREETING:
                return says('{"word": "k3v9"}' if way in self.obeys else "Hello!")
            return self.says.pop(0) if len(self.says) > 1 else self.says[0]


def way_of(body: Body) -> str:
    """Return how a request asks for structure."""
    return "json_schema" if "response_format" in body else "tool" if "tools" in body else "prompt"


def pieces(body: Body, text: str) -> list[Body]:
    """Return the deltas that write a text, as content or as the arguments of a tool call."""
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    if "tools" not in body:
        return [{"content": part} for part in parts]
    name = [{"index": 0, "id": "call-1", "type": "function", "function": {"name": "record", "arguments": ""}}]
    return [{"tool_calls": name}, *({"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in parts)]


def usage(text: str, read: int = 300) -> Body:
    return {"prompt_tokens": read, "completion_tokens": len(text), "total_tokens": read + len(text)}


def seen(body: Body, most: int = 16_384) -> int:
    """Return how many visual tokens a request's pages are, each shrunk to so many at most."""
    urls = [part["image_url"]["url"] for turn in body["messages"] for part in turn["content"] if "image_url" in part]
    sizes = [struct.unpack(">II", base64.b64decode(url.partition(",")[2])[16:24]) for url in urls]  # where a PNG has them
    return sum(min(most, width * height // 784) for width, height in sizes)


def says(text: str, finish_reason: str | None = None, tail: Callable[[Wire], None] = Wire.end) -> Say:
    """Answer with a text, streamed as hosted servers do it: a role first, then pieces, the reason, the usage."""

    def say(wire: Wire, body: Body) -> None:
        reason = finish_reason or ("tool_calls" if "tools" in body else "stop")
        wire.begin()
        for delta in ({"role": "assistant", "content": ""}, *pieces(body, text)):
            scores = (
                [{"token": delta["content"], "logprob": -0.5, "bytes": list(delta["content"].encode())}] if delta.get("content") else []
            )
            scored = {"logprobs": {"content": scores}} if body.get("logprobs") and scores else {}
            wire.event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None, **scored}]})
        if tail is Wire.end:
            wire.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
            wire.event({"choices": [], "usage": usage(text, wire.stub.read(body))})
            wire.event("[DONE]")
        tail(wire)

    return say


def whole(text: str) -> Say:
    """Answer without streaming, although a stream was asked for."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return lambda wire, _: wire.reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage(text)})


def status(code: int, message: str = "not now", **headers: str) -> Say:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda wire, _: wire.reply(code, {"error": {"message": message, "code": code}}, named)


def sends(*events: Any) -> Say:
    """Send these events and end."""

    def say(wire: Wire, _: Body) -> None:
        wire.begin()
        for event in events:
            wire.event(event)
        wire.end()

    return say


def lost(wire: Wire, _: Body) -> None:
    """Lose the connection without a word."""
    wire.cut()


def stalls(wire: Wire) -> None:
    """Say no more, and stay."""
    wire.stub.over.wait(STALL_S)


def endless(*parts: str, scored: bool = False) -> Say:
    """Write these parts, the last again and again, until nobody listens any more; without any, count."""

    def say(wire: Wire, _: Body) -> None:
        wire.begin()
        try:
            for number in takewhile(lambda _: not wire.stub.over.is_set(), count()):
                part = parts[min(number, len(parts) - 1)] if parts else f"{number} "
                scores = {"logprobs": {"content": [{"token": part, "logprob": -0.5}]}} if scored else {}
                wire.event({"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None, **scores}]})
        except OSError:
            wire.close_connection = True
            wire.stub.left.set()

    return say


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
