"""Synthetic documents -> the trained demonstration checkpoint. Needs no data, no network and no GPU (uses one if there).

    torchrun --nproc-per-node 2 -m pipeline.demo.train --minutes 90 --work out/demo     # one process per core
    python -m pipeline.demo.train --work out/demo --export pipeline/demo/checkpoint     # AWQ layout, as shipped

Two lessons at once. The language loss alone stays for hours where the format is learned and the page is not read; a
linear head on each visual token that must name the characters whose centres lie in each of its eight columns of 3.5 px
teaches the vision tower its letters within minutes. The first fifth of the time has only that lesson, on pages filled
with random words.

Every batch is drawn anew, so the accuracy it logs is one on unseen documents. Seeds from `HELD_OUT` on are never drawn.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from pipeline import prompt
from pipeline.demo import documents, drawing, model
from pipeline.demo.documents import HEIGHT_PX, HELD_OUT, WIDTH_PX, Form, Pen, Sample, Sheet, answer
from pipeline.engines.vision import batch_windows
from pipeline.records import Pixels
from pipeline.schema import Schema

COLUMNS = 8
LETTERS = {chr(c): i for i, c in enumerate([*range(33, 127), 0x20AC, 0xA3], start=1)}
ROWS_OF_TOKENS, TOKENS_IN_ROW = HEIGHT_PX // 28, WIDTH_PX // 28
IGNORED = -100
SCHEMAS = Path(__file__).parents[2] / "schemas"


@dataclass
class Batch:
    """Pages and, unless it is a spelling lesson, the conversations about them.

    `pages` (n, 448, 448, 3) uint8, `letters` (n * 256, 8) classes, `ids` and `labels` (documents, length).
    """

    pages: Tensor
    letters: Tensor
    ids: Tensor | None = None
    labels: Tensor | None = None

    def to(self, device: str) -> Batch:
        moved: dict[str, Any] = {name: tensor if tensor is None else tensor.to(device) for name, tensor in vars(self).items()}
        return Batch(**moved)


def draw_page(sheet: Sheet, rng: random.Random) -> tuple[Pixels, np.ndarray[Any, Any]]:
    """Return one page as a PDF reader or, one time in three, a scanner shows it, and its letters' classes."""
    image, angle = drawing.pixels(sheet), 0.0
    if rng.random() < 0.35:
        image, angle = drawing.scan(image, rng)
    return image, letters(sheet, angle)


def letters(sheet: Sheet, angle_deg: float) -> np.ndarray[Any, Any]:
    """Return the class of the character centred in each column of each visual token, 0 for none: (256, 8)."""
    found = np.zeros((ROWS_OF_TOKENS * TOKENS_IN_ROW, COLUMNS), np.int64)
    sine, cosine = math.sin(math.radians(angle_deg)), math.cos(math.radians(angle_deg))
    for run in sheet.runs:
        x_px = run.x_px
        for letter, width_px in zip(run.text, documents.char_widths(run.text, run.font, run.size_px), strict=True):
            dx, dy = x_px + width_px / 2 - WIDTH_PX / 2, run.y_px - 0.3 * run.size_px - HEIGHT_PX / 2
            x, y = WIDTH_PX / 2 + dx * cosine + dy * sine, HEIGHT_PX / 2 - dx * sine + dy * cosine
            x_px += width_px
            if letter in LETTERS and 0 <= x < WIDTH_PX and 0 <= y < HEIGHT_PX:
                found[int(y) // 28 * TOKENS_IN_ROW + int(x) // 28, int(x % 28 / 28 * COLUMNS)] = LETTERS[letter]
    return found


def spelling_sheet(rng: random.Random) -> Sheet:
    """Return a page filled with random words, numbers and signs, each row in a font of its own."""
    pen = Pen(rng)
    sheet = pen.sheets[0]
    while pen.room() > 0:
        fonts = Pen(rng)
        pen.plain, pen.bold, pen.size_px, x_px = fonts.plain, fonts.bold, fonts.size_px, pen.left_px
        while x_px < pen.right_px - 10:
            bold = rng.random() < 0.3
            word = "".join(rng.choices("".join(LETTERS), k=rng.randint(1, 6))) if rng.random() < 0.25 else documents.sample_word(rng)
            width_px = pen.width(word, bold)
            if x_px + width_px > WIDTH_PX - 4:
                break
            pen.write(word, x_px, bold=bold)
            x_px += width_px + rng.choice((pen.size_px * 0.27, rng.uniform(4, 60)))
        pen.next_row()
    return sheet


class Lessons(IterableDataset[Batch]):
    """Endless batches; the first `spelling` of them are spelling lessons."""

    def __init__(self, seed: int, batch_size: int, spelling: Any) -> None:
        self.seed, self.batch_size, self.spelling = seed, batch_size, spelling

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        known = model.schemas(SCHEMAS)
        words = model.processor(known)
        while True:
            if self.spelling.value:
                yield self.spell(rng)
            else:
                yield from self.read(rng, words, known)

    def spell(self, rng: random.Random) -> Batch:
        return pages_of([spelling_sheet(rng) for _ in range(self.batch_size)], rng)

    def read(self, rng: random.Random, words: Any, known: dict[str, Schema]) -> Iterator[Batch]:
        """Yield four batches of one kind of document, sorted by length so that little is padded."""
        kinds: tuple[tuple[Form, int], ...] = (("invoice", 1), ("receipt", 1), ("invoice", 2))
        form, pages = rng.choices(kinds, (60, 28, 12))[0]
        count = max(1, self.batch_size // pages)
        samples = [documents.sample(rng.randrange(HELD_OUT), form, pages) for _ in range(4 * count)]
        samples.sort(key=lambda sample: len(answer(sample.truth)))
        starts = list(range(0, len(samples), count))
        rng.shuffle(starts)
        for start in starts:
            chosen = samples[start : start + count]
            batch = pages_of([sheet for sample in chosen for sheet in sample.sheets], rng)
            batch.ids, batch.labels = conversations(chosen, words, known[form])
            yield batch


def pages_of(sheets: list[Sheet], rng: random.Random) -> Batch:
    drawn = [draw_page(sheet, rng) for sheet in sheets]
    images, classes = (np.stack(part) for part in zip(*drawn, strict=True))
    return Batch(torch.from_numpy(images), torch.from_numpy(np.concatenate(classes[:, None]).reshape(-1, COLUMNS)))


def question(words: Any, schema: Schema, pages: int) -> str:
    """Return the prompt as the engine will write it, each page's visual tokens spelled out."""
    content = [{"type": "image"}] * pages + [{"type": "text", "text": prompt.ASK}]
    turns = [{"role": "system", "content": prompt.system(schema)}, {"role": "user", "content": content}]
    text: str = words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return text.replace("<|image_pad|>", "<|image_pad|>" * (ROWS_OF_TOKENS * TOKENS_IN_ROW))


def conversations(samples: list[Sample], words: Any, schema: Schema) -> tuple[Tensor, Tensor]:
    """Return token ids, padded at the end, and the labels: the answers' tokens, everything else ignored."""
    tokenizer = words.tokenizer
    asked = tokenizer(question(words, schema, len(samples[0].sheets)))["input_ids"]
    answers = [tokenizer(answer(sample.truth) + "<|im_end|>")["input_ids"] for sample in samples]
    length = len(asked) + max(map(len, answers))
    ids = torch.full((len(samples), length), tokenizer.pad_token_id)
    labels = torch.full((len(samples), length), IGNORED)
    for row, tokens in enumerate(answers):
        ids[row, : len(asked) + len(tokens)] = torch.tensor(asked + tokens)
        labels[row, len(asked) : len(asked) + len(tokens)] = torch.tensor(tokens)
    return ids, labels


def patches(pages: Tensor) -> Tensor:
    """Return normalised pages as Qwen's processor lays them out: (n * 1024, 1176), merge groups of 2×2 patches together."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=pages.device)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=pages.device)
    n, height, width, _ = pages.shape
    image = ((pages / 255 - mean) / std).permute(0, 3, 1, 2)
    tiles = image.reshape(n, 3, height // 28, 2, 14, width // 28, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return tiles.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(n * height * width // 196, -1)


class Pupil(nn.Module):
    """The model and the spelling head, which is thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        words = model.tokenizer(model.schemas(SCHEMAS))
        self.first_key = cast(int, words.convert_tokens_to_ids("<|video_pad|>")) + 1
        self.reader = model.untrained(words)
        batch_windows(self.reader)
        self.speller = nn.Linear(cast(Any, self.reader.config.text_config).hidden_size, COLUMNS * (len(LETTERS) + 1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one batch and what to log of it."""
        core, n = self.reader.model, len(batch.pages)
        grid = torch.tensor([[1, HEIGHT_PX // 14, WIDTH_PX // 14]], device=batch.pages.device).expand(n, 3)
        seen = torch.cat(list(core.get_image_features(patches(batch.pages), grid, return_dict=True).pooler_output))
        spelled = self.speller(seen.float()).unflatten(-1, (COLUMNS, -1))
        weight = torch.ones(len(LETTERS) + 1, device=spelled.device).index_fill(0, torch.tensor([0], device=spelled.device), 0.1)
        loss = cross_entropy(spelled.flatten(0, 1), batch.letters.flatten(), weight=weight)
        marked = batch.letters > 0
        log = {"spell": loss.item(), "letters": (spelled.argmax(-1) == batch.letters)[marked].float().mean().item()}
        if batch.ids is None or batch.labels is None:
            return loss, log
        logits = self.read(batch.ids, grid, seen)[:, :-1]
        wanted = batch.labels[:, 1:]
        told = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)
        return loss + told, log | {"read": told.item(), "values": self.values_right(logits.argmax(-1), wanted)}

    def read(self, ids: Tensor, grid: Tensor, seen: Tensor) -> Tensor:
        core = self.reader.model
        kinds = (ids == self.reader.config.image_token_id).int()
        places, _ = core.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        told = core.get_input_embeddings()(ids)
        told = told.masked_scatter(kinds.bool().unsqueeze(-1), seen.to(told.dtype))
        hidden = core.language_model(inputs_embeds=told, position_ids=places, use_cache=False).last_hidden_state
        logits: Tensor = self.reader.lm_head(hidden)
        return logits

    def values_right(self, guessed: Tensor, wanted: Tensor) -> float:
        """Return the share of values, the runs of tokens between keys, that are right in every token (teacher-forced)."""
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


def optimizers(pupil: Pupil) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for everything else (embeddings, norms, biases, heads)."""
    inner = [p for n, p in pupil.reader.model.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in inner}
    outer = [p for p in pupil.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def learning_rate(step: int, done: float, peak: float) -> float:
    """Return 40 warm-up steps, then a cosine that reaches nearly zero when the time is up."""
    return peak * min(1.0, (step + 1) / 40) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def share(pupil: Pupil, elapsed_s: float) -> float:
    """Average gradients over all processes; return their mean elapsed time, so that all keep one schedule."""
    if not dist.is_initialized():
        return elapsed_s
    grads = [p.grad for p in pupil.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([elapsed_s])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, part in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
    return float(flat[-1])


def train(work: Path, minutes: float, batch_size: int, peak: float, spelling_share: float) -> None:
    """Train for so many minutes, saving every few; a folder with a state in it is trained on."""
    rank, device = int(os.environ.get("RANK", 0)), "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and device == "cpu":
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    pupil = Pupil().to(device)
    steppers = optimizers(pupil)
    step, before_s = restore(work, pupil, steppers)
    spelling = torch.multiprocessing.get_context("fork").Value("b", before_s < spelling_share * minutes * 60)
    lessons = Lessons(step * 1000 + rank, batch_size, spelling)
    loader = iter(DataLoader(lessons, batch_size=None, num_workers=1 if device == "cpu" else 8, prefetch_factor=4))
    started, logged, saved = time.monotonic(), time.monotonic(), time.monotonic()
    elapsed_s, window = before_s, []
    while elapsed_s < minutes * 60:
        batch = next(loader)
        batch = batch.to(device)
        with torch.autocast(device, torch.bfloat16):
            loss, log = pupil(batch)
        loss.backward()
        elapsed_s = share(pupil, before_s + time.monotonic() - started)
        rate = learning_rate(step, elapsed_s / (minutes * 60), peak)
        nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        step += 1
        spelling.value = elapsed_s < spelling_share * minutes * 60
        window.append(log)
        if rank == 0 and time.monotonic() - logged > 20:
            print(line(step, elapsed_s, rate, window), flush=True)
            logged, window = time.monotonic(), []
        if rank == 0 and time.monotonic() - saved > 240:
            save(work, pupil, steppers, step, elapsed_s)
            saved = time.monotonic()
    if rank == 0:
        print(line(step, elapsed_s, 0.0, window or [{}]), flush=True)
        save(work, pupil, steppers, step, elapsed_s)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def line(step: int, elapsed_s: float, rate: float, window: list[dict[str, float]]) -> str:
    """Return one log line: the means since the last one."""
    names = dict.fromkeys(name for log in window for name in log)
    means = {n: np.mean([log[n] for log in window if n in log]) for n in names}
    return f"{elapsed_s / 60:6.1f} min  step {step:6}  lr {rate:.1e}  " + "  ".join(f"{n} {m:.4f}" for n, m in means.items())


def save(work: Path, pupil: Pupil, steppers: list[torch.optim.Optimizer], step: int, elapsed_s: float) -> None:
    state = {"pupil": pupil.state_dict(), "steppers": [s.state_dict() for s in steppers], "step": step, "elapsed_s": elapsed_s}
    torch.save(state, work / "state.tmp")
    (work / "state.tmp").replace(work / "state.pt")


def restore(work: Path, pupil: Pupil, steppers: list[torch.optim.Optimizer] | None) -> tuple[int, float]:
    """Load a saved state, if there is one; return its step and the time it was trained for."""
    if not (work / "state.pt").exists():
        return 0, 0.0
    state = torch.load(work / "state.pt", map_location="cpu", weights_only=True)
    pupil.load_state_dict(state["pupil"])
    for stepper, saved in zip(steppers or (), state["steppers"], strict=steppers is not None):
        stepper.load_state_dict(saved)
    return state["step"], state["elapsed_s"]


def export(work: Path, folder: Path) -> None:
    """Write the trained model as a plain checkpoint to `work`/plain and, rounded to 4 bits in AWQ layout, to `folder`."""
    from pipeline.awq import quantize

    pupil = Pupil()
    if not restore(work, pupil, None)[0]:
        raise SystemExit(f"{work} holds no training state")
    plain = work / "plain"
    cast(nn.Module, pupil.reader).half()
    pupil.reader.save_pretrained(plain)
    model.processor(model.schemas(SCHEMAS)).save_pretrained(plain)
    quantize(plain, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the training state")
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, earlier runs in the same folder included")
    parser.add_argument("--batch-size", type=int, default=16, help="pages per process and step")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--spelling-share", type=float, default=0.15, help="share of the time spent on letters alone")
    parser.add_argument("--export", type=Path, help="write the checkpoint to this folder instead of training")
    given = parser.parse_args()
    if given.export:
        export(given.work, given.export)
    else:
        train(given.work, given.minutes, given.batch_size, given.peak, given.spelling_share)


if __name__ == "__main__":
    main()
