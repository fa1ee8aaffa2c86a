"""Generation step: runs one forward pass over rows of the batch and appends the next tokens to each of them.

One pass takes pending tokens, scores those that were forced, chooses one token for each row from those its grammar allows, and appends
the tokens that are then forced. Log-probabilities are the model's own, before mask and temperature, and are computed from the logits of
this pass alone: logits of earlier passes are not kept.

A step copies one tensor to the device and one back; between the two nothing waits for the device. A pass over a prompt copies its images
too. A pass over rows that answer may be a replay (`replay.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engines.completion import LOOP_EVERY, convert_request_error, find_loop, make_loop_error
from pipeline.engines.encoding import Encoder
from pipeline.engines.transformers.attention import build_mask
from pipeline.engines.transformers.batch import (
    CHOSEN,
    PASS_COST_TOKENS,
    Batch,
    BatchRow,
    PassShape,
    StagedPass,
    choose_width,
    is_choosing,
    stage_pass,
    view_arrays,
)
from pipeline.engines.transformers.cache import COLUMN_STEP, VIEW_STEP, KeyValueCache, PassWindow, round_up
from pipeline.engines.transformers.replay import MOST_TOKENS, WIDTHS, round_rows
from pipeline.errors import DocumentError
from pipeline.records import FinishReason
from pipeline.schema.grammar import Vocabulary


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint that is ready to answer: what the engine needs in each pass."""

    network: Any
    """transformers' Qwen2-VL, Qwen2.5-VL or Qwen3-VL model."""
    encoder: Encoder
    vocabulary: Vocabulary
    device: torch.device
    pad_id: int

    def make_cache(self, max_tokens: int | None = None) -> KeyValueCache:
        """Return an empty cache for this model."""
        config = self.network.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        embedding = self.network.get_input_embeddings().weight
        return KeyValueCache(config.num_hidden_layers, config.num_key_value_heads, size, embedding.dtype, self.device, max_tokens)


@torch.inference_mode()
def run_step(model: LoadedModel, batch: Batch, span: range) -> None:
    """Run one forward pass over the batch's rows in `span` and append a token to every one that goes on.

    They either all read their prompts, as `Batch.select_reading` returns them, or all answer. An error of one row becomes its outcome. An
    exception (out of memory, for example) leaves all rows unchanged.
    """
    # 1) All that the pass needs, the grammars' masks among it, is computed on the CPU and copied at once.
    rows = batch.rows[span.start : span.stop]
    is_replayed = batch.replays.is_on and span == batch.answering
    shape = choose_replayed_shape(model, batch) if is_replayed else choose_shape(model, batch, span)
    masks = model.vocabulary.compute_masks([row.constraint for row in rows if is_choosing(row, min(shape.width, len(row.pending)))])
    staged = stage_pass(batch, shape, span.stop, masks, model.pad_id, model.device.type == "cuda")
    shown = [image for row in rows if row.is_reading for image in row.prompt.list_images(row.cached, row.cached + shape.width)]
    images = model.encoder.build_pixel_values(shown)
    # 2) The device computes, and its answer is one tensor.
    numbers = run_pass(model, batch, staged, images, is_replayed)
    tokens, scores = numbers[: shape.rows].tolist(), numbers[shape.rows :].view(np.float32).tolist()
    margins, logprobs, further = scores[: shape.rows], scores[shape.rows : 2 * shape.rows], iter(scores[2 * shape.rows :])
    # 3) From here on only single rows can fail.
    for at, (row, fed) in enumerate(zip(rows, staged.fed, strict=True)):
        scored, is_given_one = row.list_scored(fed), is_choosing(row, fed)
        row.advance(fed)
        row.logprobs += [logprobs[at] if place == fed - 1 else next(further) for place in scored]
        if is_given_one:
            row.point = None
            append_token(row, tokens[at], logprobs[at], margins[at], model.vocabulary)


def choose_shape(model: LoadedModel, batch: Batch, span: range) -> PassShape:
    """Return the shape of a pass that is computed for these rows alone, and make room for it in the cache."""
    rows = batch.rows[span.start : span.stop]
    is_reading = rows[0].is_reading
    width = max(row.measure_part(batch.part_tokens) for row in rows) if is_reading else choose_width(rows, get_pass_cost(model.device))
    needed = max(row.cached for row in rows) + width
    batch.cache.reserve(len(batch), max(needed, *(row.cached for row in batch.rows)))
    is_masked = any(row.cached for row in rows) and not len(rows) == width == 1
    columns = min(round_up(needed, VIEW_STEP), batch.cache.shape[1]) if is_masked else needed
    further = sum(place < min(width, len(row.pending)) - 1 for row in rows for place in row.list_scored(width))
    is_first = all(not row.cached for row in rows)
    return PassShape(span.start, len(rows), width, columns, further, is_first, is_masked, is_drawing(rows), model.vocabulary.size)


def choose_replayed_shape(model: LoadedModel, batch: Batch) -> PassShape:
    """Return one of few shapes (`replay.py`) for the rows that answer, and make room for it in the cache."""
    rows = batch.rows[: len(batch.answering)]
    widths = [width for width in WIDTHS if width == 1 or width * round_rows(len(rows)) <= MOST_TOKENS]
    width = choose_width(rows, get_pass_cost(model.device), widths)
    batch.cache.reserve(len(batch), max(row.cached for row in batch.rows) + width)  # also behind the rows that are padding
    count = min(round_rows(len(rows)), batch.cache.shape[0])
    columns = round_up(max(row.cached for row in rows) + width, COLUMN_STEP)
    return PassShape(0, count, width, columns, count * (width - 1), False, True, is_drawing(rows), model.vocabulary.size)


def get_pass_cost(device: torch.device) -> int:
    """Return what a pass costs besides its tokens, in tokens."""
    return PASS_COST_TOKENS.get(device.type, PASS_COST_TOKENS["cuda"])


def is_drawing(rows: Sequence[BatchRow]) -> bool:
    """Return whether any row's next token may be another than the most probable one."""
    return any(row.sampling.temperature > 0 or row.sampling.repetition_penalty != 1 for row in rows)


def run_pass(model: LoadedModel, batch: Batch, staged: StagedPass, images: dict[str, Tensor], is_replayed: bool) -> NDArray[np.int32]:
    """Return what the device computes from a staged pass, computed or replayed: see `compute_pass`."""
    compute = partial(compute_pass, model, batch.cache, staged.shape, images=images)
    if is_replayed:
        return batch.replays.run(staged.shape, staged.words, model.device, batch.cache.generation, compute).cpu().numpy()
    return compute(staged.words.to(model.device, non_blocking=True)).cpu().numpy()


def compute_pass(model: LoadedModel, cache: KeyValueCache, shape: PassShape, words: Tensor, images: dict[str, Tensor]) -> Tensor:
    """Return what the device computes in a pass of this shape, as int32 words: tokens and their margins (rows), log-probabilities.

    `words` are the staged words on the device; the numbers of rows that get no token, and of padding, mean nothing. Nothing here waits for
    the device or copies from or to it, but for the vision tower; nothing depends on more than the shape and these tensors, so that the
    operations can be recorded.
    """
    # 1) Run the network; it writes keys and values into the cache.
    given = view_arrays(words, shape)
    cached, places, mask = given["cached"].long(), None, None
    if not shape.is_first:
        rows = torch.arange(shape.rows, device=words.device).unsqueeze(1)
        places = (rows, cached.unsqueeze(1) + torch.arange(shape.width, device=words.device))
    if shape.is_masked:
        config = model.network.config.get_text_config()
        groups = 1 if shape.rows == 1 else config.num_attention_heads // config.num_key_value_heads
        mask = build_mask(cached, shape.width, shape.columns, groups, cache.dtype)
    cache.open_window(PassWindow(shape.start, shape.start + shape.rows, shape.columns, places))
    hidden = model.network.model(
        input_ids=given["ids"].long(),
        attention_mask=mask,
        position_ids=given["positions"].long(),
        past_key_values=cache,
        use_cache=True,
        **images,
    ).last_hidden_state
    # 2) Logits only where they are needed: after the last token of each row, and before each forced token.
    logits = model.network.lm_head(hidden.flatten(0, 1).index_select(0, given["places"])).float()
    # 3) Choose the next tokens, and score them and the forced ones.
    allow = unpack_masks(given["masks"], shape.vocabulary)
    new, follows = logits[: shape.rows], given["follows"].long()
    allowed = new.masked_fill(~allow, float("-inf"))
    chosen = draw_tokens(new, allow, given) if shape.is_drawing else allowed.argmax(dim=-1)
    at = chosen.unsqueeze(1)
    margins = (new.gather(1, at) - allowed.scatter(1, at, float("-inf")).amax(dim=-1, keepdim=True)).squeeze(1)  # inf: no other is allowed
    last = follows[: shape.rows]
    follows = torch.cat([torch.where(last == CHOSEN, chosen, last), follows[shape.rows :]])
    scored = logits.gather(1, follows.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
    return torch.cat([chosen.int(), margins.view(torch.int32), scored.view(torch.int32)])


def unpack_masks(words: Tensor, size: int) -> Tensor:
    """Unpack bit masks (rows, words) into (rows, vocabulary) booleans."""
    bits = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, :size].bool()


def draw_tokens(logits: Tensor, allow: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Return one allowed token for each row: the most probable one, or a random one if the row's sampling has a temperature.

    Random are: temperature, then the `top_k` most probable, then the fewest whose probabilities add up to `top_p`.
    """
    point, temperature, top_p, penalty, top_k = given["draws"].unbind(1)
    scores = apply_repetition_penalty(logits, unpack_masks(given["used"], logits.shape[1]), penalty).masked_fill(~allow, float("-inf"))
    heat = torch.where(temperature > 0, temperature, 1.0).float().unsqueeze(1)
    probabilities, tokens = (scores / heat).softmax(dim=-1).sort(descending=True, stable=True)
    rank = torch.arange(tokens.shape[1], device=tokens.device)
    probabilities = probabilities.masked_fill(rank >= top_k.unsqueeze(1), 0.0)
    cumulative = probabilities.double().cumsum(dim=-1)
    wanted = (cumulative - probabilities < top_p.unsqueeze(1) * cumulative[:, -1:]) & (rank < top_k.unsqueeze(1))
    last = wanted.sum(-1, keepdim=True).clamp(min=1) - 1
    reached = (cumulative <= point.unsqueeze(1) * cumulative.gather(1, last)).sum(-1, keepdim=True)
    return torch.where(temperature > 0, tokens.gather(1, torch.minimum(reached, last)).squeeze(1), scores.argmax(dim=-1))


def apply_repetition_penalty(logits: Tensor, used: Tensor, penalty: Tensor) -> Tensor:
    """Return logits (rows, vocabulary) with those of tokens in the prompt or the answer lowered (arXiv:1909.05858, section 4.1)."""
    factor = penalty.float().unsqueeze(1)
    return torch.where(used, torch.where(logits > 0, logits / factor, logits * factor), logits)


def append_token(row: BatchRow, token: int, logprob: float, margin: float, vocabulary: Vocabulary) -> None:
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
            if np.isfinite(margin):
                row.margins[len(row.tokens)] = margin
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.pending = [token]
            row.append_forced()
        except Exception as error:  # any: the tokens of the other rows are chosen already and must not be lost
            row.outcome = convert_request_error(error)
    if len(row.tokens) // LOOP_EVERY > before // LOOP_EVERY and row.outcome is None and (repeated := find_loop(row.tokens)):
        text = b"".join(map(vocabulary.decode_token, repeated)).decode(errors="replace")
        row.outcome = make_loop_error(text, len(repeated), len(row.tokens))
