"""Requests -> answers by vLLM, which runs the model in processes of its own. Knows no document and no Ray.

The prompt is token ids and page images: the checkpoint's own template with one placeholder an image, encoded as for the engine
`transformers`, so that no text can become a control token and both count the same tokens. vLLM is told the budget's bounds, within
which its image processor leaves a page as it is; a prompt that comes out another length is refused.

    Message("user", (page of 56 x 84 px, "Return …"))  ->  [… <|image_pad|> …] + the page  ->  vLLM  ->  [… 6 x <|image_pad|> …]

vLLM masks the logits by the grammar before it computes log-probabilities, whatever its `logprobs_mode`: under a schema they are those
among the tokens that the grammar allows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.engines import checkpoint, checkpoint_files
from pipeline.engines.completion import LOOP_EVERY, build_completion, check_token_length, convert_request_error, find_loop, make_loop_error
from pipeline.engines.encoding import EncodedPrompt, Encoder
from pipeline.engines.event_loop import EventLoopThread
from pipeline.engines.vllm import launch
from pipeline.engines.vllm.launch import read_reason_since
from pipeline.errors import DocumentError, EngineDead, JobError, PipelineError, RunError
from pipeline.records import Completion, FinishReason, Request
from pipeline.schema.grammar import ANY_TEXT, KEPT_GRAMMARS, Vocabulary, compile_schema


class VLLMEngine:
    """Qwen2.5-VL or Qwen2-VL by vLLM, quantised or not."""

    name = "vllm"

    def __init__(
        self, model: str, arguments: Mapping[str, Any], *, revision: str | None = None, threads: int | None = None,
        max_request_tokens: int | None = None, rope_scaling: dict[str, Any] | None = None, lora: str | None = None,
    ) -> None:  # fmt: skip
        """Load a checkpoint (hub id or folder); `arguments` are those of vLLM's engine, `threads` the cores it may use without a GPU.

        Raises JobError for a checkpoint or an argument that cannot be used, RunError when vLLM does not start.
        """
        self.model, self.max_request_tokens = model, max_request_tokens
        folder = checkpoint.locate_checkpoint(model, revision)
        checkpoint_files.check_checkpoint_files(folder, any_quantization=True)
        config = checkpoint.load_config(folder, rope_scaling)
        tokenizer = self._encode_by(folder, config.image_token_id)
        size = config.get_text_config().vocab_size
        self._vocabulary = Vocabulary(tokenizer.backend_tokenizer.to_str(), size=size, eos_ids=[tokenizer.eos_token_id])
        self._numbers, self._heard = count(), launch.prepare_environment(threads)
        self._background = EventLoopThread("vllm-engine")
        self._lora = checkpoint.locate_checkpoint(lora, None) if lora else None
        try:
            asked = launch.build_engine_arguments(folder, config, bool(rope_scaling), self._lora, arguments)
            self._llm, self._watch = launch.start_with_watch(lambda: self._background.begin(launch.start_vllm(asked)))
        except BaseException as error:
            self._background.close()
            if isinstance(error, RuntimeError):  # "Engine core initialization failed. See root cause above"
                raise RunError(f"vLLM does not start: {read_reason_since(self._heard) or error}") from error
            raise
        self.max_model_len = int(self._llm.model_config.max_model_len)

    async def complete(self, request: Request) -> Completion:
        """Return the answer to one request; from any event loop."""
        return await self._background.answer(self._answer(request))

    def close(self) -> None:
        """End vLLM's processes. Requests still waiting fail with EngineDead."""
        launch.release_watch(self._watch)
        self._background.close(last=self._llm.shutdown)

    def _encode_by(self, folder: Path, image_token: int) -> Any:
        """Take on a checkpoint's chat template, and return its tokenizer."""
        processor = checkpoint.load_processor(folder)
        self._encoder = Encoder(processor, image_token, torch.device("cpu"))
        checkpoint.check_chat_template(self._encoder, folder)
        return processor.tokenizer

    # What follows runs in the engine's own loop, or in threads of it.

    async def _answer(self, request: Request) -> Completion:
        """Return the answer to one request. What goes wrong is its own fault, unless vLLM's processes have died of it."""
        try:
            prompt = await asyncio.to_thread(self._prepare, request)
            return await self._written(request, prompt)
        except PipelineError:
            raise
        except Exception as error:  # any: vLLM's own classes have no common one, and change with its version
            if self._llm.errored or type(error).__name__ == "EngineDeadError":
                said = read_reason_since(self._heard) or "its process ended without a word"
                raise EngineDead(f"vLLM cannot go on: {said}") from error
            raise convert_request_error(error.__cause__ if isinstance(error.__cause__, Exception) else error) from None

    def _prepare(self, request: Request) -> EncodedPrompt:
        """Return a request's prompt, refusing what cannot be answered."""
        prompt = self._encoder.encode(request.messages)
        check_token_length(len(prompt.ids), request.sampling.max_tokens, self.max_model_len, self.max_request_tokens)
        return prompt

    async def _written(self, request: Request, prompt: EncodedPrompt) -> Completion:
        """Ask vLLM, look at what it writes while it does, and return the whole."""
        asked: dict[str, Any] = {"prompt_token_ids": prompt.short}
        if prompt.images:
            asked["multi_modal_data"] = {"image": [Image.fromarray(page) for page in prompt.images]}
        tokens, logprobs, reason = list[int](), list[float](), None
        answering = self._llm.generate(
            asked, build_sampling_params(request), str(next(self._numbers)), lora_request=make_lora_request(self._lora)
        )
        async with aclosing(answering) as pieces:
            async for piece in pieces:
                if not tokens:
                    check_prompt_tokens(prompt, piece.prompt_token_ids)
                [more], before = piece.outputs, len(tokens)
                tokens += more.token_ids
                logprobs += [scores[token].logprob for token, scores in zip(more.token_ids, more.logprobs, strict=True)]
                reason = more.finish_reason
                if reason is None and len(tokens) // LOOP_EVERY > before // LOOP_EVERY and (repeated := find_loop(tokens)):
                    said = b"".join(map(self._vocabulary.decode_token, repeated)).decode(errors="replace")
                    raise make_loop_error(said, len(repeated), len(tokens))
        return self._completion(request, prompt, tokens, logprobs, reason)

    def _completion(
        self, request: Request, prompt: EncodedPrompt, tokens: list[int], logprobs: list[float], reason: str | None
    ) -> Completion:
        """Return what vLLM wrote as an answer, without the token that ended it."""
        if reason not in ("stop", "length"):
            raise DocumentError("engine", f"vLLM ended the answer after {len(tokens)} tokens with the reason {reason!r}")
        length = min(len(tokens) - (reason == "stop"), request.sampling.max_tokens)
        finished = FinishReason.STOP if reason == "stop" else FinishReason.LENGTH
        return build_completion(tokens[:length], logprobs[:length], finished, len(prompt.ids), self._vocabulary.decode_token)


def make_lora_request(folder: Path | None) -> Any:
    """Return the LoRA adapter in this folder as a request names it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, str(folder)) if folder else None


def build_sampling_params(request: Request) -> Any:
    """Return a request's sampling as vLLM takes it. The token that ends an answer is one beside `max_tokens`.

    Raises DocumentError for a schema that cannot constrain.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.temperature else None,  # a generator of its own for each request costs time
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens + 1,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(**build_structured_outputs(request.schema)),
    )


@lru_cache(maxsize=KEPT_GRAMMARS)
def build_structured_outputs(schema: str) -> dict[str, Any]:
    """Return what holds an answer to a schema: the one that the engine `transformers` decodes by, what llguidance cannot express left out.

    Without a schema any text is allowed, but no control token and no broken UTF-8.
    """
    if not schema:
        return {"grammar": ANY_TEXT}
    try:
        [grammar] = json.loads(compile_schema(schema).text)["grammars"]
    except JobError as error:
        raise DocumentError("schema", str(error)) from None
    return {"json": json.dumps(grammar["json_schema"])}


def check_prompt_tokens(prompt: EncodedPrompt, found: list[int]) -> None:
    """Refuse an answer to other pages than those that were planned: resized ones have other numbers of visual tokens."""
    if found != prompt.ids:
        expected = [f"{image.shape[1]}x{image.shape[0]}" for image in prompt.images]
        raise DocumentError("pixels", f"vLLM changed the prompt from {len(prompt.ids)} to {len(found)} tokens; its pages are {expected} px")
