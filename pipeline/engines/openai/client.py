"""HTTP client for Chat Completions: sends a call's body, reads the streamed answer, and retries. Only this file imports httpx2.

    429, 5xx, a lost connection, an incomplete or stalled answer   retried with growing waits; `Retry-After` is obeyed
    any other 4xx                                                  this request's failure (DocumentError)
    no connection in all attempts                                  EngineDead

Redirects are not followed, because the key must not be sent to another host. The key is removed from all messages.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from pipeline.engines.openai.chat import ChatAnswer, RetryableError, extract_error_message
from pipeline.engines.openai.event_stream import EventReader
from pipeline.errors import DocumentError, EngineDead
from pipeline.records import Completion
from pipeline.version import __version__

MAX_WAIT_S = 60.0
"""Longest wait that this client chooses."""
MAX_RETRY_AFTER_S = 300.0
"""Longest wait that a server may ask for."""
CONNECT_S = 10.0
LINGER_S = 1.0
"""Time for a reply to end after its last event: only then can its connection be used again."""
IDLE_STEP = 0.01
"""Share of the idle timeout by which it is moved on: not with every event, because that costs as much as reading one."""
MAX_ERROR_BYTES = 65_536
MAX_REPLY_BYTES = 64 * 2**20
RETRIED_STATUSES = {408, 409, 425, 429}
TOO_LONG = re.compile(r"context_length_exceeded|maximum (context|model) length|longer than the maximum", re.IGNORECASE)


@dataclass(frozen=True)
class RetryPolicy:
    """Concurrent calls, time limits of a call, and retries."""

    concurrency: int = 16
    idle_timeout_s: float = 120.0
    timeout_s: float = 900.0
    max_retries: int = 6
    backoff_s: float = 1.0


class ChatClient:
    """The connections to one server. Belongs to one event loop."""

    def __init__(self, base_url: str, key: str | None, policy: RetryPolicy) -> None:
        self.base_url, self.policy, self._key = base_url.rstrip("/"), policy, key
        headers = {
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": f"pipeline/{__version__}",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        }
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=policy.concurrency)
        timeout = httpx2.Timeout(None, connect=CONNECT_S)
        self._client = httpx2.AsyncClient(headers=headers, limits=limits, timeout=timeout, follow_redirects=False)
        self._last_reply_s = float("-inf")

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch_models(self) -> list[dict[str, Any]] | None:
        """Return the server's list of models; None if it has no such list.

        Raises DocumentError `refused` for a wrong key, RetryableError when the server cannot be reached.
        """
        call = self._client.stream("GET", f"{self.base_url}/models", headers={"Connection": "close"})
        try:  # not kept alive: `transformers serve` fails here and closes it, perhaps during the next call
            async with asyncio.timeout(self.policy.idle_timeout_s), call as reply:
                data = await receive_reply(reply, MAX_REPLY_BYTES)
        except (httpx2.HTTPError, httpx2.StreamError, TimeoutError) as error:
            raise RetryableError("unreachable", f"{self.base_url} cannot be reached ({self._format_exception(error)})") from None
        if reply.status_code in (401, 403):
            raise DocumentError("refused", f"{self.base_url} answers {reply.status_code}: {self._extract_message(data)}")
        try:
            return [card for card in json.loads(data)["data"] if isinstance(card, dict)] if reply.status_code == 200 else None
        except (ValueError, KeyError, TypeError):
            return None

    async def complete(self, body: bytes, max_tokens: int) -> Completion:
        """Return the answer to one call, after retries if necessary.

        Raises DocumentError when this call cannot be answered, EngineDead when the server cannot be reached in any attempt.
        """
        started_s, attempt = time.monotonic(), 0
        while True:
            try:
                return await self._send_once(body, max_tokens)
            except RetryableError as fault:
                if attempt == self.policy.max_retries:
                    raise self._build_final_error(fault, attempt + 1, started_s) from None
                await asyncio.sleep(compute_wait_s(attempt, fault.wait_s, self.policy.backoff_s))
                attempt += 1

    async def _send_once(self, body: bytes, max_tokens: int) -> Completion:
        """Return the answer to one attempt. Raises RetryableError when another attempt may help."""
        answer, policy = ChatAnswer(max_tokens), self.policy
        try:
            async with asyncio.timeout(policy.timeout_s) as whole, asyncio.timeout(policy.idle_timeout_s) as idle:
                await self._receive(body, answer, idle)
        except TimeoutError:
            if answer.finish_reason is None and whole.expired():
                message = f"the answer was still being written after {policy.timeout_s:g} s (model.timeout_s) and was cut"
                raise DocumentError("timeout", message) from None
            if answer.finish_reason is None:
                raise RetryableError("timeout", f"nothing came for {policy.idle_timeout_s:g} s (model.idle_timeout_s)") from None
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise RetryableError("unreachable", f"{self.base_url} cannot be reached ({self._format_exception(error)})") from None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise RetryableError("connection", f"the connection was lost ({self._format_exception(error)})") from None
        return answer.build_completion()

    async def _receive(self, body: bytes, answer: ChatAnswer, idle: asyncio.Timeout) -> None:
        """Send a call and add the reply's events to the answer. Each event restarts the idle timeout; too long an answer is cut."""
        now, step_s = asyncio.get_running_loop().time, self.policy.idle_timeout_s * IDLE_STEP
        async with self._client.stream("POST", f"{self.base_url}/chat/completions", content=body) as reply:
            self._last_reply_s = time.monotonic()
            if reply.status_code != 200:
                raise self._build_status_error(
                    reply.status_code, await receive_reply(reply, MAX_ERROR_BYTES), reply.headers.get("Retry-After", "")
                )
            async for data in iterate_events(reply):
                ended = data == "[DONE]"
                due_s = now() + (LINGER_S if ended else self.policy.idle_timeout_s)
                if not idle.expired() and abs(due_s - (idle.when() or 0.0)) > step_s:
                    idle.reschedule(due_s)
                if not ended:
                    event = parse_event(data)
                    if status := find_late_status(event):
                        raise self._build_status_error(status, data.encode())
                    answer.add_event(event)
                if answer.is_too_long:
                    return

    def _build_status_error(self, status: int, data: bytes, retry_after: str = "") -> RetryableError | DocumentError:
        """Return the error of a reply with another status than 200."""
        message = self._extract_message(data)
        if status in RETRIED_STATUSES or status >= 500:
            kind = "busy" if status == 429 else "server"
            return RetryableError(kind, f"the server answers {status}: {message}", parse_retry_after(retry_after))
        if 300 <= status < 400:
            return DocumentError("refused", f"the server answers {status}, a redirect, which is not followed: correct model.base_url")
        kind = "too_long" if TOO_LONG.search(data.decode("utf-8", "replace")) else "refused"
        return DocumentError(kind, f"the server answers {status}: {message}")

    def _build_final_error(self, fault: RetryableError, times: int, started_s: float) -> DocumentError | EngineDead:
        """Return the error of a call after its last attempt: EngineDead when no call has reached the server since it started."""
        message = self._redact_key(f"{fault.message}; asked {times} times")
        if fault.kind == "unreachable" and self._last_reply_s < started_s:
            return EngineDead(message)
        return DocumentError("connection" if fault.kind == "unreachable" else fault.kind, message)

    def _extract_message(self, data: bytes) -> str:
        """Return the error message of a reply's JSON or HTML, shortened and without the key."""
        text = data.decode("utf-8", "replace")
        try:
            return self._redact_key(extract_error_message(json.loads(text)))
        except ValueError:
            return self._redact_key(extract_error_message(re.sub(r"<[^>]*>", " ", text)))

    def _format_exception(self, error: BaseException) -> str:
        return self._redact_key(f"{type(error).__name__}: {error}".removesuffix(": "))

    def _redact_key(self, text: str) -> str:
        """Return a text without the key, which a server may repeat in its messages."""
        return text.replace(self._key, "***") if self._key else text


async def receive_reply(reply: httpx2.Response, max_bytes: int) -> bytes:
    """Return a reply's body, cut after `max_bytes`."""
    data = b""
    async for block in reply.aiter_bytes():
        data += block
        if len(data) >= max_bytes:
            break
    return data[:max_bytes]


async def iterate_events(reply: httpx2.Response) -> AsyncIterator[str]:
    """Yield the data of each server-sent event; of a reply without events, its body."""
    if reply.headers.get("Content-Type", "").startswith("text/event-stream"):
        reader = EventReader()
        async for block in reply.aiter_bytes():
            for data in reader.read_block(block):
                yield data
            if len(reader.rest) > MAX_REPLY_BYTES:
                raise RetryableError("garbled", f"the server sent an event of more than {MAX_REPLY_BYTES // 2**20} MiB")
    else:
        yield (await receive_reply(reply, MAX_REPLY_BYTES)).decode("utf-8", "replace")


def parse_event(data: str) -> Any:
    """Return an event's JSON value. Raises RetryableError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise RetryableError("garbled", f"the server sent what is no JSON: {data[:80]!r}") from None


def find_late_status(event: Any) -> int | None:
    """Return the status 4xx in an event: vLLM checks a schema after it has sent its 200, and reports the error in the stream."""
    error = event.get("error") if isinstance(event, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 500 else None


def compute_wait_s(attempt: int, retry_after_s: float | None, backoff_s: float) -> float:
    """Return how long to wait after a failed attempt, counted from 0: as the server asked, or twice as long each time.

    Random, so that concurrent calls do not all return at the same moment.
    """
    if retry_after_s is not None:
        return min(retry_after_s, MAX_RETRY_AFTER_S) + random.uniform(0, backoff_s)
    return random.uniform(0.5, 1.0) * min(MAX_WAIT_S, backoff_s * 2.0**attempt)


def parse_retry_after(retry_after: str) -> float | None:
    """Return the seconds of a Retry-After header (RFC 9110, 10.2.3): a number or a date; None if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", retry_after.strip()):
        return float(retry_after)
    try:
        then = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
