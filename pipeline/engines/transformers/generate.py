"""Generation step: runs one forward pass over rows of the batch and appends the next tokens to each of them.

One pass takes pending tokens, scores those that were forced, chooses one token for each row from those its grammar allows, and appends
the tokens that are then forced. Log-probabilities are the model's own, before mask and temperature, and are computed from the logits of
this pass alone: logits of earlier passes are not kept.

A step copies one tensor to the device and one back; between the two nothing waits for the device. A pass over a prompt copies its images
too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engines.completion import LOOP_EVERY, convert_request_error, find_loop, make_loop_error
from pipeline.engines.encoding import Encoder
from pipeline.engines.transformers.attention import build_mask
from pipeline.engines.transformers.batch import PASS_COST_TOKENS, Batch, BatchRow, StagedPass, choose_width, is_choosing, stage_pass
from pipeline.engines.transformers.cache import VIEW_STEP, KeyValueCache, PassWindow, round_up
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
    rows = [batch.rows[at] for at in span]
    is_reading = rows[0].is_reading
    pass_cost = PASS_COST_TOKENS.get(model.device.type, PASS_COST_TOKENS["cuda"])
    widest = max(row.measure_part(batch.part_tokens) for row in rows) if is_reading else choose_width(rows, pass_cost)
    needed = max(row.cached for row in rows) + widest
    batch.cache.reserve(len(batch), max(needed, max(row.cached for row in batch.rows)))
    columns = needed if len(rows) == widest == 1 else min(round_up(needed, VIEW_STEP), batch.cache.shape[1])
    masks = model.vocabulary.compute_masks([row.constraint for row in rows if is_choosing(row, min(widest, len(row.pending)))])
    staged = stage_pass(rows, span.start, widest, masks, columns, model.pad_id, model.vocabulary.size, model.device.type == "cuda")
    shown = [image for row in rows for image in row.prompt.list_images(row.cached, row.cached + widest)] if is_reading else []
    images = model.encoder.build_pixel_values(shown)
    # 2) The device computes, and its answer is one tensor.
    words = staged.words.to(model.device, non_blocking=True)
    numbers = compute_pass(model, batch.cache, staged, words, images).cpu().numpy()
    count = len(staged.choosing)
    tokens, scores = iter(numbers[:count].tolist()), numbers[count:].view(np.float32).tolist()
    margins, chosen_logprobs, forced_logprobs = iter(scores[:count]), iter(scores[count : 2 * count]), iter(scores[2 * count :])
    # 3) From here on only single rows can fail.
    choosing = set(staged.choosing)
    for at, row in enumerate(rows):
        row.logprobs += [next(forced_logprobs) for _ in range(row.advance(staged.fed[at]))]
        if at in choosing:
            row.point = None
            append_token(row, next(tokens), next(chosen_logprobs), next(margins), model.vocabulary)


def compute_pass(model: LoadedModel, cache: KeyValueCache, staged: StagedPass, words: Tensor, images: dict[str, Tensor]) -> Tensor:
    """Return what the device computes from a staged pass, as int32 words: chosen tokens, their margins, all log-probabilities (float32).

    `words` are the staged words on the device. Nothing here waits for the device or copies from or to it, but for the vision tower.
    """
    # 1) Run the network; it writes keys and values into the cache.
    given = staged.unpack(words)
    cached, places = given["cached"].long(), None
    mask = None
    if not staged.is_first:
        rows = torch.arange(staged.stop - staged.start, device=words.device).unsqueeze(1)
        places = (rows, cached.unsqueeze(1) + torch.arange(staged.width, device=words.device))
    if not staged.is_first and not staged.is_even:
        config = model.network.config.get_text_config()
        groups = 1 if len(cached) == 1 else config.num_attention_heads // config.num_key_value_heads
        mask = build_mask(cached, staged.width, staged.columns, groups, cache.dtype)
    cache.open_window(PassWindow(staged.start, staged.stop, staged.columns, places))
    hidden = model.network.model(
        input_ids=given["ids"].long(),
        attention_mask=mask,
        position_ids=given["positions"].long(),
        past_key_values=cache,
        use_cache=True,
        **images,
    ).last_hidden_state
    # 2) Logits only where they are needed: at the end of a row that gets a new token, and before each forced token.
    logits = model.network.lm_head(hidden.flatten(0, 1).index_select(0, given["places"])).float()
    # 3) Choose the next tokens, and score them and the forced ones.
    allow = unpack_masks(given["masks"], logits.shape[-1])
    new = logits[: len(staged.choosing)]
    allowed = new.masked_fill(~allow, float("-inf"))
    chosen = draw_tokens(new, allow, given, staged) if staged.is_drawing else allowed.argmax(dim=-1)
    at = chosen.unsqueeze(1)
    margins = (new.gather(1, at) - allowed.scatter(1, at, float("-inf")).amax(dim=-1, keepdim=True)).squeeze(1)  # inf: no other is allowed
    follows = torch.cat([chosen, given["follows"].long()])
    scored = logits.gather(1, follows.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)
    return torch.cat([chosen.int(), margins.view(torch.int32), scored.view(torch.int32)])


def unpack_masks(words: Tensor, size: int) -> Tensor:
    """Unpack bit masks (rows, words) into (rows, vocabulary) booleans."""
    bits = torch.arange(32, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> bits) & 1).flatten(1)[:, :size].bool()


def draw_tokens(logits: Tensor, allow: Tensor, given: dict[str, Tensor], staged: StagedPass) -> Tensor:
    """Return one allowed token for each row: the most probable one, or a random one if the row's sampling has a temperature.

    Random are: temperature, then the `top_k` most probable, then the fewest whose probabilities add up to `top_p`.
    """
    point, temperature, top_p, penalty, top_k = given["draws"].unbind(1)
    used = torch.zeros_like(allow).flatten().index_fill_(0, given["used"].long(), True).view_as(allow)
    scores = apply_repetition_penalty(logits, used, penalty).masked_fill(~allow, float("-inf"))
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
