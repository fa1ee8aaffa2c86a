"""Engine `vllm`: requests with page images come in, completions with a log-probability for each token go out.
vLLM answers them in child processes of its own; a request that cannot be answered raises DocumentError.

vLLM receives token ids and the patches of page images (`pages.py`). The ids are those of the checkpoint's template, encoded as for the
engine `transformers`, so no text can become a control token and both engines count the same tokens. Pages outside of the budget's bounds,
for which vLLM has planned its memory, are refused.

    Message("user", (page of 56 x 84 px, "Return …"))  ->  [… 6 x <|image_pad|> …] + 24 patches  ->  vLLM

Patches are twice as large as pages. They are made when vLLM is about to need them: it has two steps' worth of prompts that it has not begun
to answer (`TokenWindow`), and all others wait as pages.

vLLM masks the logits by the grammar before it computes log-probabilities, with any `logprobs_mode`: under a schema they are relative to
the tokens that the grammar allows.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, aclosing
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch

from pipeline.engines import checkpoint, checkpoint_files
from pipeline.engines.completion import (
    LOOP_EVERY,
    TokenClock,
    build_completion,
    check_token_length,
    convert_request_error,
    find_loop,
    make_loop_error,
)
from pipeline.engines.encoding import EncodedPrompt, Encoder
from pipeline.engines.event_loop import EventLoopThread
from pipeline.engines.vllm import launch
from pipeline.engines.vllm.launch import read_reason_since
from pipeline.engines.vllm.pages import PageCutter
from pipeline.errors import DocumentError, EngineDead, JobError, PipelineError, RunError
from pipeline.records import Completion, FinishReason, Pixels, Request
from pipeline.schema.grammar import ANY_TEXT, KEPT_GRAMMARS, Vocabulary, compile_schema

STEPS_AHEAD = 2
"""Steps of vLLM's scheduler for which it has prompts: one is computed while the next is sent."""


class VLLMEngine:
    """Qwen3-VL, Qwen2.5-VL or Qwen2-VL in vLLM, with quantized or unquantized weights."""

    name = "vllm"

    def __init__(
        self, model: str, arguments: Mapping[str, Any], *, revision: str | None = None, threads: int | None = None,
        max_request_tokens: int | None = None, rope_scaling: dict[str, Any] | None = None, lora: Path | None = None,
        logprobs: bool = True,
    ) -> None:  # fmt: skip
        """Load a checkpoint (hub id or folder). `arguments` are those of vLLM's engine, `threads` is its number of cores without a GPU.

        Raises JobError for a checkpoint or an argument that cannot be used, RunError when vLLM does not start.
        """
        self.model, self.max_request_tokens, self._logprobs = model, max_request_tokens, logprobs
        self._page_areas = (arguments.get("mm_processor_kwargs") or {}).get("size")
        folder = checkpoint.locate_checkpoint(model, revision)
        checkpoint_files.check_checkpoint_files(folder, any_quantization=True)
        config = checkpoint.load_config(folder, rope_scaling)
        if max_request_tokens:  # vLLM wants a cache for one request of this length, 38 GB for the 262,144 tokens of Qwen3-VL-8B
            arguments = {"max_model_len": min(checkpoint.count_context_tokens(config), max_request_tokens), **arguments}
        processor = self._load_encoder(folder, config.image_token_id)
        size = config.get_text_config().vocab_size
        self._vocabulary = Vocabulary(processor.tokenizer.backend_tokenizer.to_str(), size=size, eos_ids=[processor.tokenizer.eos_token_id])
        self._request_ids, self._log_offset = count(), launch.prepare_environment(threads)
        self._loop_thread, self._clock = EventLoopThread("vllm-engine"), TokenClock()
        self._lora = lora
        try:
            engine_arguments = launch.build_engine_arguments(folder, config, bool(rope_scaling), self._lora, arguments)
            self._llm, self._killer = launch.start_with_killer(lambda: self._loop_thread.submit(launch.start_vllm(engine_arguments)))
        except BaseException as error:
            self._loop_thread.close()
            if isinstance(error, RuntimeError):  # "Engine core initialization failed. See root cause above"
                raise RunError(f"vLLM does not start: {read_reason_since(self._log_offset) or error}") from error
            raise
        self.max_model_len = int(self._llm.model_config.max_model_len)
        own_dtype = None if getattr(engine_arguments, launch.NORMALIZE, False) else self._llm.model_config.dtype
        self._cutter = PageCutter.of_processor(processor.image_processor, own_dtype)
        self._window = TokenWindow(STEPS_AHEAD * int(self._llm.vllm_config.scheduler_config.max_num_batched_tokens))

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; called from any event loop."""
        with self._clock.count_request():
            return await self._loop_thread.run(self._complete(request))

    def measure_silence_s(self) -> float:
        """Return for how long the engine has had requests and no token."""
        return self._clock.measure_silence_s()

    def close(self) -> None:
        """End vLLM's processes. Requests still waiting fail with EngineDead."""
        self._killer.release()
        self._loop_thread.close(on_close=self._llm.shutdown)

    def _load_encoder(self, folder: Path, image_token: int) -> Any:
        """Set the encoder, made of the checkpoint's chat template and tokenizer; return transformers' processor."""
        processor = checkpoint.load_processor(folder)
        self._encoder = Encoder(processor, image_token, torch.device("cpu"))
        checkpoint.check_chat_template(self._encoder, folder)
        return processor

    # The following methods run in the engine's own loop or its executor.

    async def _complete(self, request: Request) -> Completion:
        """Return the answer to one request. An error becomes this request's DocumentError, or EngineDead if vLLM's processes died."""
        try:
            return await self._generate(request, await asyncio.to_thread(self._prepare, request))
        except PipelineError:
            raise
        except Exception as error:  # any: vLLM's exceptions have no common class, and change between versions
            if self._llm.errored or type(error).__name__ == "EngineDeadError":
                reason = read_reason_since(self._log_offset) or "its process ended without a word"
                raise EngineDead(f"vLLM cannot go on: {reason}") from error
            raise convert_request_error(error.__cause__ if isinstance(error.__cause__, Exception) else error) from None

    def _prepare(self, request: Request) -> EncodedPrompt:
        """Return a request's prompt. Raises DocumentError for one that cannot be answered."""
        prompt = self._encoder.encode(request.messages)
        check_token_length(len(prompt.ids), request.sampling.max_tokens, self.max_model_len, self.max_request_tokens)
        if prompt.images and self._page_areas:
            check_page_areas(prompt.images, self._page_areas)
        return prompt

    async def _generate(self, request: Request, prompt: EncodedPrompt) -> Completion:
        """Wait for this request's turn, stream vLLM's answer and return it. Raises DocumentError for an answer that loops."""
        tokens, logprobs, reason = list[int](), list[float](), None
        sampling, number = build_sampling_params(request, self._logprobs), str(next(self._request_ids))
        await self._window.enter(len(prompt.ids))
        with ExitStack() as unanswered:
            unanswered.callback(self._window.leave, len(prompt.ids))
            given: dict[str, Any] = {"prompt_token_ids": prompt.ids}
            if prompt.images:
                given = await asyncio.to_thread(self._cutter.build_input, prompt, request.page_ids)
            outputs = self._llm.generate(given, sampling, number, lora_request=make_lora_request(self._lora))
            async with aclosing(outputs):
                async for output in outputs:
                    given.pop("mm_kwargs", None)  # the patches: vLLM's generator holds its arguments to the end
                    unanswered.close()
                    self._clock.note_token()
                    [added], before = output.outputs, len(tokens)
                    tokens += added.token_ids
                    if self._logprobs:
                        logprobs += [scores[token].logprob for token, scores in zip(added.token_ids, added.logprobs, strict=True)]
                    reason = added.finish_reason
                    if reason is None and len(tokens) // LOOP_EVERY > before // LOOP_EVERY and (repeated := find_loop(tokens)):
                        text = b"".join(map(self._vocabulary.decode_token, repeated)).decode(errors="replace")
                        raise make_loop_error(text, len(repeated), len(tokens))
        return self._build_completion(request, prompt, tokens, logprobs, reason)

    def _build_completion(
        self, request: Request, prompt: EncodedPrompt, tokens: list[int], logprobs: list[float], reason: str | None
    ) -> Completion:
        """Return the completion of an answer, without its end token. Raises DocumentError for an unknown finish reason."""
        if reason not in ("stop", "length"):
            raise DocumentError("engine", f"vLLM ended the answer after {len(tokens)} tokens with the reason {reason!r}")
        length = min(len(tokens) - (reason == "stop"), request.sampling.max_tokens)
        finished = FinishReason.STOP if reason == "stop" else FinishReason.LENGTH
        scores = logprobs[:length] if self._logprobs else None
        return build_completion(tokens[:length], scores, finished, len(prompt.ids), self._vocabulary.decode_token)


class TokenWindow:
    """Lets requests through in their order while those within have no more tokens than a bound; one alone may have any number."""

    def __init__(self, most: int) -> None:
        self.most, self.within = most, 0
        self._waiting = deque[tuple[int, asyncio.Future[None]]]()

    async def enter(self, tokens: int) -> None:
        """Wait for room. Every `enter` that returns is followed by one `leave`."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, turn))
        self._let_through()
        try:
            await turn
        except asyncio.CancelledError:
            self.leave(0 if turn.cancelled() else tokens)
            raise

    def leave(self, tokens: int) -> None:
        """Give room back."""
        self.within -= tokens
        self._let_through()

    def _let_through(self) -> None:
        while self._waiting:
            tokens, turn = self._waiting[0]
            if not turn.cancelled():
                if self.within and self.within + tokens > self.most:
                    return
                self.within += tokens
                turn.set_result(None)
            self._waiting.popleft()


def make_lora_request(folder: Path | None) -> Any:
    """Return the `lora_request` argument for the adapter in this folder; None without one."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(folder)) if folder else None


def build_sampling_params(request: Request, logprobs: bool = True) -> Any:
    """Return a request's sampling in vLLM's form, whose `max_tokens` includes the end token.

    Raises DocumentError for a schema that cannot constrain the decoding.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.temperature else None,  # a seeded generator for each request costs time
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens + 1,
        logprobs=0 if logprobs else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(**build_structured_outputs(request.schema)),
    )


@lru_cache(maxsize=KEPT_GRAMMARS)
def build_structured_outputs(schema: str) -> dict[str, Any]:
    """Return the constraint of an answer: the schema without the keywords that llguidance cannot express, as in the engine `transformers`.

    Without a schema any text is allowed, but no control token and no invalid UTF-8.
    """
    if not schema:
        return {"grammar": ANY_TEXT}
    try:
        [grammar] = json.loads(compile_schema(schema).text)["grammars"]
    except JobError as error:
        raise DocumentError("schema", str(error)) from None
    return {"json": json.dumps(grammar["json_schema"])}


def check_page_areas(pages: Sequence[Pixels], allowed: Mapping[str, int]) -> None:
    """Raise DocumentError for pages that vLLM's image processor would resize: an area outside of its bounds."""
    found = [f"{page.shape[1]}x{page.shape[0]}" for page in pages]
    low, high = allowed["shortest_edge"], allowed["longest_edge"]
    if not all(low <= page.shape[0] * page.shape[1] <= high for page in pages):
        raise DocumentError("pixels", f"vLLM is set up for pages of {low:,} to {high:,} pixels; its pages are {found} px")
