"""A batch of answers -> the same batch one forward pass further. Knows no queue and no thread.

One pass feeds the model what is pending, scores the tokens that were forced, chooses one token per row from those its grammar
allows, and appends what is then forced. Log-probabilities are the model's own, before mask and temperature, of one row of
logits at a time: steps x vocabulary is never kept.
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
    """A loaded checkpoint."""

    network: Any
    """transformers' Qwen2-VL or Qwen2.5-VL model."""
    encoder: Encoder
    vocabulary: Vocabulary
    device: torch.device
    filler: int
    """The id that pads."""


@torch.inference_mode()
def run_step(model: LoadedModel, batch: Batch) -> None:
    """Run one forward pass over the batch and move every row on.

    What goes wrong with one row is written into it. An exception (out of memory, say) leaves the rows as they were.
    """
    # 1) Feed. The first pass of a row brings its images; rows are never fed for the first time beside older ones.
    ids, mask, positions = batch.inputs(model.filler)
    images = model.encoder.pixel_values([row.prompt for row in batch.rows]) if batch.columns == 0 else {}
    try:
        hidden = model.network.model(
            input_ids=ids.to(model.device),
            attention_mask=torch.cat([batch.seen, mask], dim=1).to(model.device),
            position_ids=positions.to(model.device),
            past_key_values=batch.cache,
            use_cache=True,
            **images,
        ).last_hidden_state
        # 2) While a GPU is still computing, the CPU finds what may come next.
        masks = model.vocabulary.compute_masks([row.constraint for row in batch.rows])
        # 3) Logits only where one is needed: before each forced token and at the end.
        places = [(at, back) for at, row in enumerate(batch.rows) for back in range(row.unscored, -1, -1)]
        rows, back = torch.tensor(places, device=hidden.device).unbind(1)
        logits = model.network.lm_head(hidden[rows, hidden.shape[1] - 1 - back]).float()
        # 4) Score what was forced, choose what was not.
        last = back == 0
        chosen = choose_tokens(logits[last], unpack_masks(masks, logits), batch.rows)
        follows = torch.tensor([batch.rows[at].tokens[-back] if back else 0 for at, back in places], device=logits.device)
        follows[last] = chosen
        scored = iter((logits.gather(1, follows.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)).tolist())
        tokens = chosen.tolist()
    except BaseException:
        batch.rewind()
        raise
    # 5) Nothing can fail for the whole batch any more.
    batch.feed(mask)
    for row, token in zip(batch.rows, tokens, strict=True):
        row.logprobs += [next(scored) for _ in range(row.unscored)]
        row.unscored, logprob = 0, next(scored)
        if row.ended is None:
            append_token(row, token, logprob, model.vocabulary)


def unpack_masks(masks: Masks, logits: Tensor) -> Tensor:
    """Unpack bit masks into (rows, vocabulary) booleans on the logits' device."""
    words = torch.from_numpy(masks).to(logits.device)
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, : logits.shape[-1]].bool()


def choose_tokens(logits: Tensor, allow: Tensor, rows: list[BatchRow]) -> Tensor:
    """Return one allowed token per row: the likeliest, or drawn where the row's sampling says so."""
    chosen = logits.masked_fill(~allow, float("-inf")).argmax(dim=-1)
    for at, row in enumerate(rows):
        if row.ended is None and (row.sampling.temperature > 0 or row.sampling.repetition_penalty != 1):
            scores = apply_repetition_penalty(logits[at], [*row.prompt.ids, *row.tokens], row.sampling.repetition_penalty)
            chosen[at] = sample_tokens(scores.masked_fill(~allow[at], float("-inf")), row.sampling, row.chance)
    return chosen


def apply_repetition_penalty(scores: Tensor, used: list[int], penalty: float) -> Tensor:
    """Make tokens that stand in the prompt or the answer less likely (arXiv:1909.05858, section 4.1)."""
    index = torch.tensor(sorted(set(used)), device=scores.device)
    before = scores[index]
    return scores.index_put((index,), torch.where(before > 0, before / penalty, before * penalty))


def sample_tokens(scores: Tensor, sampling: Sampling, chance: torch.Generator) -> int:
    """Draw one token: temperature, then the `top_k` likeliest, then as many as make up `top_p`.

    The random number comes from the request's own generator on the CPU, so that an answer does not depend on its batch.
    """
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities, tokens = (scores / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
    heap = probabilities.double().cumsum(dim=-1)
    kept = int((heap - probabilities < sampling.top_p * heap[-1]).sum())
    heap = heap[: max(1, kept)]
    point = float(torch.rand((), generator=chance, dtype=torch.float64)) * float(heap[-1])
    return int(tokens[min(int((heap <= point).sum()), len(heap) - 1)])


def append_token(row: BatchRow, token: int, logprob: float, vocabulary: Vocabulary) -> None:
    """Append a chosen token to a row and what is forced behind it, or note how the row ends."""
    before = len(row.tokens)
    if row.constraint.error:
        row.ended = DocumentError("grammar", f"the schema's grammar gave up: {row.constraint.error}")
    elif not np.isfinite(logprob):
        row.ended = DocumentError("engine", "the model returned numbers that are not finite; another dtype may help")
    elif token in vocabulary.eos_ids:
        row.ended = FinishReason.STOP
    else:
        try:
            row.constraint.accept_token(token)
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.pending = [token]
            row.force()
        except Exception as error:  # any: the other rows' tokens are chosen already
            row.ended = convert_request_error(error)
    if len(row.tokens) // LOOP_EVERY > before // LOOP_EVERY and row.ended is None and (repeated := find_loop(row.tokens)):
        row.ended = make_loop_error(
            b"".join(map(vocabulary.decode_token, repeated)).decode(errors="replace"), len(repeated), len(row.tokens)
        )
