"""Generation step: runs one forward pass over a batch and appends the next tokens to every row.

One pass takes the pending tokens, scores those that were forced, chooses one token for each row from those its grammar allows, and
appends the tokens that are then forced. Log-probabilities are the model's own, before mask and temperature, and are computed from the
logits of this pass alone: logits of earlier passes are not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.completion import LOOP_EVERY, convert_request_error, find_loop, make_loop_error
from pipeline.engines.encoding import Encoder
from pipeline.engines.transformers.batch import Batch, BatchRow
from pipeline.errors import DocumentError
from pipeline.records import FinishReason, Sampling
from pipeline.schema.grammar import Masks, Vocabulary


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint that is ready to answer: what the engine needs in each pass."""

    network: Any
    """transformers' Qwen2-VL or Qwen2.5-VL model."""
    encoder: Encoder
    vocabulary: Vocabulary
    device: torch.device
    pad_id: int


@torch.inference_mode()
def run_step(model: LoadedModel, batch: Batch) -> None:
    """Run one forward pass over the batch and append a token to every row that goes on.

    An error of one row becomes its outcome. An exception (out of memory, for example) leaves all rows unchanged.
    """
    # 1) Run the network. A row's first pass takes its images too; such rows are never in one pass with older ones.
    ids, mask, positions = batch.build_inputs(model.pad_id)
    images = model.encoder.build_pixel_values([row.prompt for row in batch.rows]) if batch.columns == 0 else {}
    try:
        hidden = model.network.model(
            input_ids=ids.to(model.device),
            attention_mask=torch.cat([batch.seen, mask], dim=1).to(model.device),
            position_ids=positions.to(model.device),
            past_key_values=batch.cache,
            use_cache=True,
            **images,
        ).last_hidden_state
        # 2) While a GPU is still computing, the CPU computes which tokens the grammars allow.
        masks = model.vocabulary.compute_masks([row.constraint for row in batch.rows])
        # 3) Logits only where they are needed: before each forced token and at the end.
        positions_scored = [(at, back) for at, row in enumerate(batch.rows) for back in range(row.unscored, -1, -1)]
        rows, back = torch.tensor(positions_scored, device=hidden.device).unbind(1)
        logits = model.network.lm_head(hidden[rows, hidden.shape[1] - 1 - back]).float()
        # 4) Choose the next tokens, and score them and the forced ones.
        last = back == 0
        chosen = choose_tokens(logits[last], unpack_masks(masks, logits), batch.rows)
        follows = torch.tensor([batch.rows[at].tokens[-back] if back else 0 for at, back in positions_scored], device=logits.device)
        follows[last] = chosen
        scored = iter((logits.gather(1, follows.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)).tolist())
        tokens = chosen.tolist()
    except BaseException:
        batch.rewind()
        raise
    # 5) From here on only single rows can fail.
    batch.mark_cached(mask)
    for row, token in zip(batch.rows, tokens, strict=True):
        row.logprobs += [next(scored) for _ in range(row.unscored)]
        row.unscored, logprob = 0, next(scored)
        if row.outcome is None:
            append_token(row, token, logprob, model.vocabulary)


def unpack_masks(masks: Masks, logits: Tensor) -> Tensor:
    """Unpack bit masks into (rows, vocabulary) booleans on the logits' device."""
    words = torch.from_numpy(masks).to(logits.device)
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, : logits.shape[-1]].bool()


def choose_tokens(logits: Tensor, allow: Tensor, rows: list[BatchRow]) -> Tensor:
    """Return one allowed token for each row: the most probable one, or a random one if the row's sampling has a temperature."""
    chosen = logits.masked_fill(~allow, float("-inf")).argmax(dim=-1)
    for at, row in enumerate(rows):
        if row.outcome is None and (row.sampling.temperature > 0 or row.sampling.repetition_penalty != 1):
            scores = apply_repetition_penalty(logits[at], [*row.prompt.ids, *row.tokens], row.sampling.repetition_penalty)
            chosen[at] = sample_tokens(scores.masked_fill(~allow[at], float("-inf")), row.sampling, row.generator)
    return chosen


def apply_repetition_penalty(scores: Tensor, used: list[int], penalty: float) -> Tensor:
    """Return logits with those of tokens in the prompt or the answer lowered (arXiv:1909.05858, section 4.1)."""
    index = torch.tensor(sorted(set(used)), device=scores.device)
    before = scores[index]
    return scores.index_put((index,), torch.where(before > 0, before / penalty, before * penalty))


def sample_tokens(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return one random token: temperature, then the `top_k` most probable, then the fewest whose probabilities add up to `top_p`.

    The random number comes from the request's own generator on the CPU, so that an answer does not depend on its batch.
    """
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities, tokens = (scores / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
    cumulative = probabilities.double().cumsum(dim=-1)
    kept = int((cumulative - probabilities < sampling.top_p * cumulative[-1]).sum())
    cumulative = cumulative[: max(1, kept)]
    point = float(torch.rand((), generator=generator, dtype=torch.float64)) * float(cumulative[-1])
    return int(tokens[min(int((cumulative <= point).sum()), len(cumulative) - 1)])


def append_token(row: BatchRow, token: int, logprob: float, vocabulary: Vocabulary) -> None:
    """Append a chosen token and the tokens that it forces to a row, or set the row's outcome."""
    before = len(row.tokens)
    if row.constraint.error:
        row.outcome = DocumentError("grammar", f"the schema's grammar gave up: {row.constraint.error}")
    elif not np.isfinite(logprob):
        row.outcome = DocumentError("engine", "the model returned numbers that are not finite; another dtype may help")
    elif token in vocabulary.eos_ids:
        row.outcome = FinishReason.STOP
    else:
        try:
            row.constraint.accept_token(token)
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.pending = [token]
            row.append_forced()
        except Exception as error:  # any: the tokens of the other rows are chosen already and must not be lost
            row.outcome = convert_request_error(error)
    if len(row.tokens) // LOOP_EVERY > before // LOOP_EVERY and row.outcome is None and (repeated := find_loop(row.tokens)):
        text = b"".join(map(vocabulary.decode_token, repeated)).decode(errors="replace")
        row.outcome = make_loop_error(text, len(repeated), len(row.tokens))
