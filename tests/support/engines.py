"""A folder to work in: a small job, its schema and its documents, and an engine that says what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.records import Completion, FinishReason, Request, Usage

VALID = '{"currency":"EUR","total":19.99,"lines":[]}'
INVALID = '{"currency":"EUR","total":-1,"lines":[]}'


def make_completion(text: str = VALID, finish_reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, finish_reason, Usage(300, 20))


CUT = make_completion(finish_reason=FinishReason.LENGTH)
"""Cut by max_tokens, although what came is valid as it stands."""
Say = Completion | Exception | Callable[[Request], Completion]


class ScriptedEngine:
    """An engine that says what it is told, in that order, the last of it for ever, and remembers what it was asked.

    What a real model answers is beside the point of these tests, and which of its answers are wrong could not be arranged.
    """

    name, model = "scripted", "script-1"

    def __init__(self, *says: Say) -> None:
        self.says: list[Say] = list(says) or [make_completion()]
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Completion:
        self.asked.append(request)
        say = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(say, Exception):
            raise say
        return say if isinstance(say, Completion) else say(request)

    def close(self) -> None:
        """Nothing to release."""


class InkEngine(ScriptedEngine):
    """Reads how dark the first page is: a page's answer is its own, and no model has to be loaded, which takes seconds each time."""

    async def complete(self, request: Request) -> Completion:
        pixels = request.messages[1].parts[0]
        assert not isinstance(pixels, str)
        return make_completion(f'{{"currency":"EUR","total":{int((pixels < 128).sum()) / 100},"lines":[]}}')


def list_texts(request: Request) -> list[str]:
    """Return the texts of a conversation, its page images left out."""
    return [part for message in request.messages for part in message.parts if isinstance(part, str)]
