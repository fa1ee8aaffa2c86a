"""Engines without a model: one with scripted replies, one that counts dark pixels."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.records import Completion, FinishReason, Request, Usage

VALID = '{"currency":"EUR","total":19.99,"lines":[]}'
INVALID = '{"currency":"EUR","total":-1,"lines":[]}'


def make_completion(text: str = VALID, finish_reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, finish_reason, Usage(300, 20))


CUT = make_completion(finish_reason=FinishReason.LENGTH)
"""Cut by max_tokens, although the text is valid as it stands."""
Reply = Completion | Exception | Callable[[Request], Completion]


class ScriptedEngine:
    """An engine that gives these replies in their order, the last one for ever, and records its requests.

    A real model's answers do not matter to these tests, and its wrong answers could not be arranged.
    """

    name, model = "scripted", "script-1"

    def __init__(self, *replies: Reply) -> None:
        self.replies: list[Reply] = list(replies) or [make_completion()]
        self.requests: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, Completion) else reply(request)

    def measure_silence_s(self) -> float:
        return 0.0

    def close(self) -> None:
        """Nothing to release."""


class InkEngine(ScriptedEngine):
    """Answers with the number of dark pixels of the first page, which differs from page to page; loads no model, which takes seconds."""

    async def complete(self, request: Request) -> Completion:
        pixels = request.messages[1].parts[0]
        assert not isinstance(pixels, str)
        return make_completion(f'{{"currency":"EUR","total":{int((pixels < 128).sum()) / 100},"lines":[]}}')


def list_texts(request: Request) -> list[str]:
    """Return the texts of a conversation, its page images left out."""
    return [part for message in request.messages for part in message.parts if isinstance(part, str)]
