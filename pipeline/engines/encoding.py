"""Messages -> the token ids, 3-D positions and images of a Qwen-VL prompt. Knows no weights.

    system text, one page of 56 x 84 px, "Return the JSON …"
    -> <|im_start|> system … <|vision_start|> <|image_pad|> x 6 <|vision_end|> Return the JSON … <|im_start|> assistant

The text is the checkpoint's own chat template's. The images are already sized (28 x 28 px are one visual token), so the
checkpoint's image processor has nothing to resize, which is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import DocumentError
from pipeline.records import Message, Pixels
from pipeline.schema.prompt import CONTROL_TOKEN

CUT = "\x00"
"""Where the text is cut before it is tokenized. No printed text holds it."""

Grid = tuple[int, int]
"""An image's visual tokens: (down, across)."""


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One request as the model takes it."""

    ids: list[int]
    short: list[int]
    """The same with one placeholder for each image, as chat templates write it."""
    positions: NDArray[np.int64]
    """(3, tokens): time, height and width of each token, as Qwen's multimodal rotary embedding counts them."""
    images: tuple[Pixels, ...]


class Encoder:
    """A checkpoint's chat template, tokenizer and image processor. Safe to use from several threads."""

    def __init__(self, processor: Any, image_token: int, device: torch.device) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._image_token = image_token
        self._device = device
        self._merge = int(processor.image_processor.merge_size)
        self._unit_px = int(processor.image_processor.patch_size) * self._merge
        specials = sorted((re.escape(t.content) for t in self._tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
        self._control = re.compile("|".join([*specials, CONTROL_TOKEN.pattern]))
        self._one_at_a_time = Lock()

    def encode(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Return the prompt that asks for an answer to these messages.

        Raises DocumentError for an image that is not RGB of whole visual tokens.
        """
        images = tuple(part for message in messages for part in message.parts if not isinstance(part, str))
        grids = [self._grid(image) for image in images]
        with self._one_at_a_time:  # a tokenizer's truncation settings are its own state
            text = self._processor.apply_chat_template([self._turn(m) for m in messages], tokenize=False, add_generation_prompt=True)
            pieces = [self._tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(CUT)]
        short = [token for piece in pieces for token in piece]
        if short.count(self._image_token) != len(images):
            raise DocumentError("prompt", f"the chat template shows {short.count(self._image_token)} of {len(images)} images")
        places = compute_positions(short, grids, self._image_token)
        return EncodedPrompt(list(expand_image_tokens(short, grids, self._image_token)), short, places, images)

    def trial(self) -> EncodedPrompt:
        """Return a prompt about a page of one visual token: what a template must be able to ask at least."""
        page = np.zeros((self._unit_px, self._unit_px, 3), np.uint8)
        return self.encode([Message("system", ("Read.",)), Message("user", (page, "What does it say?"))])

    def pixel_values(self, prompts: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """Return the images of a batch as the vision tower takes them, on the model's device; empty without images."""
        images = [image for prompt in prompts for image in prompt.images]
        if not images:
            return {}
        batch = self._processor.image_processor(
            images=images, do_resize=False, input_data_format="channels_last", device=str(self._device), return_tensors="pt"
        )
        grid = batch["image_grid_thw"]
        expected = [[1, down * self._merge, across * self._merge] for down, across in map(self._grid, images)]
        if grid.tolist() != expected:
            raise DocumentError("pixels", f"the image processor changed the images' grid: expected {expected}, found {grid.tolist()}")
        return {"pixel_values": batch["pixel_values"].to(self._device), "image_grid_thw": grid.to(self._device)}

    def _turn(self, message: Message) -> dict[str, Any]:
        """Return a message as chat templates take it."""
        if all(isinstance(part, str) for part in message.parts):
            return {"role": message.role, "content": "".join(self._harmless(str(part)) for part in message.parts)}
        parts = [{"type": "text", "text": self._harmless(p)} if isinstance(p, str) else {"type": "image"} for p in message.parts]
        return {"role": message.role, "content": parts}

    def _harmless(self, text: str) -> str:
        """Mark where to cut control tokens that a text only spells, so that no tokenizer can put them together.

        The model reads the same characters; only the template's own `<|im_end|>` ends a turn.
        """
        return self._control.sub(lambda found: found[0][0] + CUT + found[0][1:], text.replace(CUT, " "))

    def _grid(self, image: Pixels) -> Grid:
        """Return an image's visual tokens down and across."""
        unit = self._unit_px
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] % unit or image.shape[1] % unit:
            raise DocumentError("pixels", f"expected uint8 RGB of whole {unit} px steps, found {image.dtype} {image.shape}")
        return image.shape[0] // unit, image.shape[1] // unit


def expand_image_tokens(ids: Sequence[int], grids: Sequence[Grid], image_token: int) -> Iterator[int]:
    """Yield the ids with each image's placeholder repeated for each of its visual tokens."""
    left = iter(grids)
    for token in ids:
        if token == image_token:
            down, across = next(left)
            yield from [image_token] * (down * across)
        else:
            yield token


def compute_positions(ids: Sequence[int], grids: Sequence[Grid], image_token: int) -> NDArray[np.int64]:
    """Return the 3-D positions of a prompt whose images are still one placeholder each.

    Text counts up in all three; an image stands still in time and counts rows and columns from where the text stopped; the
    text after it goes on behind its longer side (Qwen2-VL report, arXiv:2409.12191, section 2.1).
    """
    columns, left, at = [], iter(grids), 0
    for token in ids:
        if token == image_token:
            down, across = next(left)
            rows, places = np.divmod(np.arange(down * across), across)
            columns.append(at + np.stack([np.zeros_like(rows), rows, places]))
            at += max(down, across)
        else:
            columns.append(np.full((3, 1), at))
            at += 1
    return np.concatenate(columns, axis=1)
