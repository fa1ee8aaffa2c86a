"""Training of the demonstration model on synthetic documents. Needs no data, no network and no GPU, and uses a GPU if there is one.

    torchrun --nproc-per-node 2 -m pipeline.demo.train --minutes 90 --work out/demo     # one process per core
    python -m pipeline.demo.train --work out/demo --export pipeline/demo/checkpoint     # AWQ layout, as shipped
    python -m pipeline.demo.train --work out/demo --average before.pt --export …        # with an earlier cycle's end (a copy of state.pt)

With the language loss alone, the model learns the format and then stays for hours on a plateau where it does not read the page. Two
more losses lead off it. A linear head on each visual token names the characters whose centres are in each of the token's eight
columns of 3.5 px: this teaches the vision tower the letters within minutes, at first on pages full of random words. And three
attention heads are trained to attend to the visual token that shows the next character to be written, and another linear head
names the column in it. `lessons.py` makes the training data.

Every batch is new, so the logged accuracy is that on unseen documents. Seeds from `HELD_OUT` on are never drawn.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from pipeline.demo import model, quantize
from pipeline.demo.lessons import CHARACTER_COLUMNS, IGNORED, LETTERS, SCHEMAS, LessonBatch, Lessons
from pipeline.demo.sheets import HEIGHT_PX, WIDTH_PX
from pipeline.engines.transformers import awq
from pipeline.engines.transformers.vision import batch_windows

POINTERS = ((1, 0), (2, 0), (2, 2))
"""(layer, head) of the attention heads that are trained to attend to the visual token of the next character."""
COLUMN_LAYERS = (2, 3)
"""The layers whose inputs a linear head reads to name the column of that token."""
POINTER_WEIGHT = 0.3
CALIBRATION_SEED, CALIBRATION_BATCHES = 7, 32
"""The pages, 256 in all, with which the inputs of the quantized layers are sampled."""


def make_patches(pages: Tensor) -> Tensor:
    """Return normalised pages as Qwen's processor lays them out: (n * 1024, 1176), merge groups of 2×2 patches together."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=pages.device)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=pages.device)
    n, height, width, _ = pages.shape
    image = ((pages / 255 - mean) / std).permute(0, 3, 1, 2)
    tiles = image.reshape(n, 3, height // 28, 2, 14, width // 28, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return tiles.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(n * height * width // 196, -1)


class Pupil(nn.Module):
    """The model and two heads that only training needs; `attended` holds the last inputs of the layers in the additional losses."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer = model.build_tokenizer(model.load_demo_schemas(SCHEMAS))
        self.first_key = cast(int, tokenizer.convert_tokens_to_ids("<|video_pad|>")) + 1
        self.reader = model.build_untrained_model(tokenizer)
        batch_windows(self.reader)
        self.attended: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        for layer in {*COLUMN_LAYERS, *(layer for layer, _ in POINTERS)}:
            attention = self.reader.model.language_model.layers[layer].self_attn
            attention.register_forward_pre_hook(partial(self.record_inputs, layer), with_kwargs=True)
        width = cast(Any, self.reader.config.text_config).hidden_size
        self.speller = nn.Linear(width, CHARACTER_COLUMNS * (len(LETTERS) + 1))
        self.columns = nn.Linear(width, CHARACTER_COLUMNS)

    def forward(self, batch: LessonBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one batch and the values to log."""
        core, n = self.reader.model, len(batch.pages)
        grid = torch.tensor([[1, HEIGHT_PX // 14, WIDTH_PX // 14]], device=batch.pages.device).expand(n, 3)
        visual = torch.cat(list(core.get_image_features(make_patches(batch.pages), grid, return_dict=True).pooler_output))
        spelled = self.speller(visual.float()).unflatten(-1, (CHARACTER_COLUMNS, -1))
        weight = torch.ones(len(LETTERS) + 1, device=spelled.device).index_fill(0, torch.tensor([0], device=spelled.device), 0.1)
        loss = cross_entropy(spelled.flatten(0, 1), batch.letters.flatten(), weight=weight)
        marked = batch.letters > 0
        log = {"spell": loss.item(), "letters": (spelled.argmax(-1) == batch.letters)[marked].float().mean().item()}
        if batch.ids is None or batch.labels is None or batch.places is None:
            return loss, log
        logits = self.compute_logits(batch.ids, grid, visual)[:, :-1]
        wanted = batch.labels[:, 1:]
        language = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)
        attention, column = self.compute_attention_loss(batch.places), self.compute_column_loss(batch.places)
        log |= {"look": attention.item(), "column": column.item()}
        copying = not bool((wanted >= self.first_key).any())
        if copying:
            log |= {"copy": language.item()}
        else:
            log |= {"read": language.item(), "values": self.compute_value_accuracy(logits.argmax(-1), wanted)}
        return loss + language + POINTER_WEIGHT * (attention + column), log

    def record_inputs(self, layer: int, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        self.attended[layer] = inputs["hidden_states"], inputs["position_embeddings"]

    def compute_attention_loss(self, places: Tensor) -> Tensor:
        """Return the cross-entropy of the trained heads' attention; its target is the visual token of the next character."""
        losses = []
        wanted = places[:, 1:, 0]
        for layer, head in POINTERS:
            attention = self.reader.model.language_model.layers[layer].self_attn
            hidden, (cosine, sine) = self.attended[layer]
            width, group = attention.head_dim, attention.num_key_value_groups
            query = attention.q_proj(hidden).unflatten(-1, (-1, width))[:, :, head]
            key = attention.k_proj(hidden).unflatten(-1, (-1, width))[:, :, head // group]
            query, key = apply_rotary_pos_emb(query, key, cosine, sine, unsqueeze_dim=0)
            scores = (query[0] @ key[0].transpose(1, 2)).float() * attention.scaling
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1), -1e4)
            losses.append(cross_entropy(scores[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=IGNORED))
        return torch.stack(losses).mean()

    def compute_column_loss(self, places: Tensor) -> Tensor:
        """Return the cross-entropy of the next character's column, as named from the inputs of the last two layers."""
        guesses = [self.columns(self.attended[layer][0][:, :-1].float()).flatten(0, 1) for layer in COLUMN_LAYERS]
        wanted = places[:, 1:, 1].flatten()
        return torch.stack([cross_entropy(guess, wanted, ignore_index=IGNORED) for guess in guesses]).mean()

    def compute_logits(self, ids: Tensor, grid: Tensor, visual: Tensor) -> Tensor:
        """Return the logits (documents, length, vocabulary) for token ids whose image placeholders become these visual tokens."""
        core = self.reader.model
        kinds = (ids == self.reader.config.image_token_id).int()
        positions, _ = core.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        embeddings = core.get_input_embeddings()(ids)
        embeddings = embeddings.masked_scatter(kinds.bool().unsqueeze(-1), visual.to(embeddings.dtype))
        hidden = core.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False).last_hidden_state
        logits: Tensor = self.reader.lm_head(hidden)
        return logits

    def compute_value_accuracy(self, guessed: Tensor, wanted: Tensor) -> float:
        """Return the share of values (runs of tokens between keys) in which every token is right, with teacher forcing."""
        right = total = 0
        for guess, want in zip(guessed.tolist(), wanted.tolist(), strict=True):
            good, inside = True, False
            for g, w in zip(guess, want, strict=True):
                is_value = w != IGNORED and w < self.first_key
                if inside and not is_value:
                    right, total, good = right + good, total + 1, True
                inside, good = is_value, good and (g == w or not is_value)
            right, total = right + (inside and good), total + inside
        return right / max(total, 1)


def make_optimizers(pupil: Pupil) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for all other parameters (embeddings, norms, biases, heads)."""
    inner = [p for n, p in pupil.reader.model.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in inner}
    outer = [p for p in pupil.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def compute_shares(done: float) -> tuple[float, float]:
    """Return the shares of spelling and, in the rest, of copying, after this part of the time: first letters, then rows, then records."""
    if done < 0.15:
        return 1.0, 0.0
    return (0.0, 0.5) if done < 0.5 else (0.0, 0.1)


def compute_learning_rate(step: int, done: float, peak: float) -> float:
    """Return the learning rate: 40 warm-up steps, then a cosine that falls to 1 % of the peak by the end of the time."""
    return peak * min(1.0, (step + 1) / 40) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def average_gradients(pupil: Pupil, elapsed_s: float) -> float:
    """Average the gradients over all processes; return their mean elapsed time, which keeps them on the same schedule."""
    if not dist.is_initialized():
        return elapsed_s
    grads = [p.grad for p in pupil.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([elapsed_s])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    return float(flat[-1])


def train_model(work: Path, minutes: float, batch_size: int, peak: float, start: Path | None = None) -> None:
    """Train for this many minutes and save the state every four. Continues from a state in `work`, else from the checkpoint `start`."""
    rank, device = int(os.environ.get("RANK", 0)), "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and device == "cpu":
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    pupil = Pupil().to(device)
    optimizers = make_optimizers(pupil)
    step, before_s = restore_state(work, pupil, optimizers)
    if start and not step:
        weights = awq.load_awq_model(
            start, AutoConfig.from_pretrained(start, trust_remote_code=False), torch.float32, torch.device("cpu")
        ).state_dict()
        pupil.reader.load_state_dict(weights)
    shares = torch.multiprocessing.get_context("fork").Array("d", 2)
    shares[:] = compute_shares(before_s / (minutes * 60))
    lessons = Lessons(step * 1000 + rank, batch_size, shares)
    loader = iter(DataLoader(lessons, batch_size=None, num_workers=1 if device == "cpu" else 8, prefetch_factor=4))
    started, logged, saved = time.monotonic(), time.monotonic(), time.monotonic()
    elapsed_s, window = before_s, []
    while elapsed_s < minutes * 60:
        batch = next(loader)
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            loss, log = pupil(batch)
        loss.backward()
        elapsed_s = average_gradients(pupil, before_s + time.monotonic() - started)
        rate = compute_learning_rate(step, elapsed_s / (minutes * 60), peak)
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        shares[:] = compute_shares(elapsed_s / (minutes * 60))
        window.append(log)
        if rank == 0 and time.monotonic() - logged > 20:
            print(format_log_line(step, elapsed_s, rate, window), flush=True)
            logged, window = time.monotonic(), []
        if rank == 0 and time.monotonic() - saved > 240:
            save_state(work, pupil, optimizers, step, elapsed_s)
            saved = time.monotonic()
    if rank == 0:
        print(format_log_line(step, elapsed_s, 0.0, window or [{}]), flush=True)
        save_state(work, pupil, optimizers, step, elapsed_s)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def format_log_line(step: int, elapsed_s: float, rate: float, window: list[dict[str, float]]) -> str:
    """Return one log line with the means since the previous one."""
    names = dict.fromkeys(name for log in window for name in log)
    means = {n: np.mean([log[n] for log in window if n in log]) for n in names}
    return f"{elapsed_s / 60:6.1f} min  step {step:6}  lr {rate:.1e}  " + "  ".join(f"{n} {m:.4f}" for n, m in means.items())


def save_state(work: Path, pupil: Pupil, optimizers: list[torch.optim.Optimizer], step: int, elapsed_s: float) -> None:
    state = {"pupil": pupil.state_dict(), "steppers": [s.state_dict() for s in optimizers], "step": step, "elapsed_s": elapsed_s}
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").replace(work / "state.pt")


def restore_state(work: Path, pupil: Pupil, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Load a saved state, if there is one; return its step and its training time in seconds."""
    if not (work / "state.pt").exists():
        return 0, 0.0
    state = torch.load(work / "state.pt", map_location="cpu", weights_only=True)
    pupil.load_state_dict(state["pupil"])
    for optimizer, saved in zip(optimizers, state["steppers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["elapsed_s"]


def average_weights(states: Sequence[Path]) -> dict[str, Tensor]:
    """Return the mean of the weights in some training states. For the ends of several learning-rate cycles it is in a flatter minimum
    than each of them, and makes fewer errors (Izmailov et al., arXiv:1803.05407)."""
    found = [torch.load(state, map_location="cpu", weights_only=True)["pupil"] for state in states]
    return {name: torch.stack([weights[name] for weights in found]).mean(0) for name in found[0]}


def export_checkpoint(work: Path, folder: Path, others: Sequence[Path]) -> None:
    """Write the trained model as a plain checkpoint to `work`/plain and, rounded to 4 bits in AWQ layout, to `folder`.

    Its weights are the mean of those in `work` and in `others`, which are earlier training states.
    """
    if not (work / "state.pt").exists():
        raise SystemExit(f"{work} holds no training state")
    pupil = Pupil()
    pupil.load_state_dict(average_weights([work / "state.pt", *others]))
    plain, moments = work / "plain", collect_second_moments(pupil)
    cast(nn.Module, pupil.reader).half()
    pupil.reader.save_pretrained(plain)
    model.build_processor(model.build_tokenizer(model.load_demo_schemas(SCHEMAS))).save_pretrained(plain)
    quantize.quantize_checkpoint(plain, folder, moments=moments)


@torch.inference_mode()
def collect_second_moments(pupil: Pupil) -> dict[str, Tensor]:
    """Return, by published name, the sum of x xᵀ over the inputs x of each quantized layer while the model reads some pages."""
    found: dict[str, Tensor] = {}

    def add_moment(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).double()
        found[name] = found.get(name, 0) + x.T @ x

    for name, layer in pupil.reader.named_modules():
        published = quantize.make_published_name(f"{name}.weight")
        if quantize.QUANTIZED.fullmatch(published):
            layer.register_forward_pre_hook(partial(add_moment, published))
    for batch in islice(Lessons(CALIBRATION_SEED, 8, (0.0, 0.0)), CALIBRATION_BATCHES):
        pupil(batch)
    return found


def train_main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training state")
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, earlier runs in the same folder included")
    parser.add_argument("--batch-size", type=int, default=16, help="pages per process and step")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--start", type=Path, help="checkpoint to begin with, such as the shipped one, instead of random weights")
    parser.add_argument("--export", type=Path, help="write the checkpoint to this folder instead of training")
    parser.add_argument(
        "--average", type=Path, nargs="+", default=[], help="training states whose weights are averaged with it for --export"
    )
    given = parser.parse_args()
    if given.export:
        export_checkpoint(given.work, given.export, given.average)
    else:
        train_model(given.work, given.minutes, given.batch_size, given.peak, given.start)


if __name__ == "__main__":
    train_main()
