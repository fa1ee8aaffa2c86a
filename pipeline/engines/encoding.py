"""Prompt encoder: turns a request's messages into token ids, 3-D positions and images, as Qwen-VL models take them.

    system text, one page of 56 x 84 px, "Return the JSON …"
    -> <|im_start|> system … <|vision_start|> <|image_pad|> x 6 <|vision_end|> Return the JSON … <|im_start|> assistant

The text is made by the checkpoint's own chat template. The images have their final size (28 x 28 px are one visual token, in Qwen3-VL
32 x 32), so neither `qwen_vl_utils.process_vision_info` nor the checkpoint's image processor has anything to resize; the resulting grid is
checked.
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
from PIL import Image
from qwen_vl_utils import process_vision_info  # type: ignore[import-untyped]

from pipeline.errors import DocumentError
from pipeline.records import Message, Pixels
from pipeline.schema.prompt import CONTROL_TOKEN

CUT = "\x00"
"""Marks where the text is cut before it is tokenized. It occurs in no printed text."""

Grid = tuple[int, int]
"""An image's visual tokens: (rows, columns)."""


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """One request's prompt in the model's form."""

    ids: list[int]
    """Token ids, each image's placeholder repeated for each of its visual tokens."""
    unexpanded_ids: list[int]
    """The same with one placeholder for each image, as chat templates write it."""
    positions: NDArray[np.int64]
    """(3, tokens): time, height and width of each token, as Qwen's multimodal rotary embedding counts them."""
    images: tuple[Pixels, ...]
    image_spans: tuple[range, ...]
    """Where in `ids` each image's visual tokens stand."""

    def cut_part(self, start: int, most: int) -> int:
        """Return where a part of the prompt that begins at `start` ends: after `most` tokens, but within no image.

        The vision tower reads an image as a whole, so the first image of a part is taken whole, and another that would be cut is left out.
        """
        stop = start + most
        spans = [span for span in self.image_spans if span.start >= start]
        for at, span in enumerate(spans):
            if span.start < stop < span.stop:
                return span.start if at else span.stop
        return stop

    def list_images(self, start: int, stop: int) -> list[Pixels]:
        """Return the images whose visual tokens begin within these tokens."""
        return [image for image, span in zip(self.images, self.image_spans, strict=True) if start <= span.start < stop]


class Encoder:
    """A checkpoint's chat template, tokenizer and image processor. Safe to use from several threads."""

    def __init__(self, processor: Any, image_token: int, device: torch.device) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._image_token = image_token
        self._device = device
        self._merge = int(processor.image_processor.merge_size)
        self._unit_px = int(processor.image_processor.patch_size) * self._merge
        special = sorted((re.escape(t.content) for t in self._tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
        self._control_token = re.compile("|".join([*special, CONTROL_TOKEN.pattern]))
        self._lock = Lock()

    def encode(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Return the prompt of these messages, up to where the answer begins.

        Raises DocumentError for an image that is not RGB of whole visual tokens, and for a template that leaves out an image.
        """
        images = tuple(part for message in messages for part in message.parts if not isinstance(part, str))
        grids = [self._compute_grid(image) for image in images]
        with self._lock:  # tokenizers keep truncation settings as shared state
            text = self._processor.apply_chat_template([self._build_turn(m) for m in messages], tokenize=False, add_generation_prompt=True)
            pieces = [self._tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in text.split(CUT)]
        ids = [token for piece in pieces for token in piece]
        if ids.count(self._image_token) != len(images):
            raise DocumentError("prompt", f"the chat template shows {ids.count(self._image_token)} of {len(images)} images")
        positions = compute_positions(ids, grids, self._image_token)
        spans = tuple(find_image_spans(ids, grids, self._image_token))
        return EncodedPrompt(list(expand_image_tokens(ids, grids, self._image_token)), ids, positions, images, spans)

    def encode_sample_page(self) -> EncodedPrompt:
        """Return a prompt about a blank page of one visual token: the least that a chat template must support."""
        page = np.zeros((self._unit_px, self._unit_px, 3), np.uint8)
        return self.encode([Message("system", ("Read.",)), Message("user", (page, "What does it say?"))])

    def build_pixel_values(self, images: Sequence[Pixels]) -> dict[str, torch.Tensor]:
        """Return images as keyword arguments of the vision tower, on the model's device; empty without images.

        `pixel_values` (patches, values of a patch) and `image_grid_thw` (images, 3). Raises DocumentError when the grid has changed.
        """
        if not images:
            return {}
        batch = self._processor.image_processor(
            images=self._process_images(images),
            do_resize=False,
            input_data_format="channels_last",
            device=str(self._device),
            return_tensors="pt",
        )
        grid = batch["image_grid_thw"]
        expected = [[1, rows * self._merge, columns * self._merge] for rows, columns in map(self._compute_grid, images)]
        if grid.tolist() != expected:
            raise DocumentError("pixels", f"the image processor changed the images' grid: expected {expected}, found {grid.tolist()}")
        return {"pixel_values": batch["pixel_values"].to(self._device), "image_grid_thw": grid.to(self._device)}

    def _process_images(self, images: Sequence[Pixels]) -> list[Pixels]:
        """Return images after Qwen's own preprocessing, which keeps every pixel of an image of whole visual tokens.

        Its default bounds would enlarge images of fewer than 4 tokens, so each image's own area is given as both bounds. Costs
        1.8 ms of CPU for a page of 840 x 1176 px; passing PIL images on would cost 10 ms, because their layout slows the image processor.
        """
        areas = [image.shape[0] * image.shape[1] for image in images]
        parts = [
            {"type": "image", "image": Image.fromarray(image), "min_pixels": area, "max_pixels": area}
            for image, area in zip(images, areas, strict=True)
        ]
        processed, _ = process_vision_info([{"role": "user", "content": parts}], image_patch_size=self._unit_px // self._merge)
        return [np.array(image) for image in processed]

    def _build_turn(self, message: Message) -> dict[str, Any]:
        """Return a message in the form that chat templates take."""
        if all(isinstance(part, str) for part in message.parts):
            return {"role": message.role, "content": "".join(self._split_control_tokens(str(part)) for part in message.parts)}
        parts = [
            {"type": "text", "text": self._split_control_tokens(p)} if isinstance(p, str) else {"type": "image"} for p in message.parts
        ]
        return {"role": message.role, "content": parts}

    def _split_control_tokens(self, text: str) -> str:
        """Mark a cut inside each control token that a text spells, so that the tokenizer cannot turn it into one.

        The model reads the same characters; only the template's own `<|im_end|>` ends a turn.
        """
        return self._control_token.sub(lambda found: found[0][0] + CUT + found[0][1:], text.replace(CUT, " "))

    def _compute_grid(self, image: Pixels) -> Grid:
        """Return an image's rows and columns of visual tokens. Raises DocumentError for another type or size."""
        unit = self._unit_px
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.shape[0] % unit or image.shape[1] % unit:
            raise DocumentError("pixels", f"expected uint8 RGB of whole {unit} px steps, found {image.dtype} {image.shape}")
        return image.shape[0] // unit, image.shape[1] // unit


def expand_image_tokens(ids: Sequence[int], grids: Sequence[Grid], image_token: int) -> Iterator[int]:
    """Yield the ids with each image's placeholder repeated for each of its visual tokens."""
    remaining = iter(grids)
    for token in ids:
        if token == image_token:
            rows, columns = next(remaining)
            yield from [image_token] * (rows * columns)
        else:
            yield token


def find_image_spans(ids: Sequence[int], grids: Sequence[Grid], image_token: int) -> Iterator[range]:
    """Yield where each image's visual tokens stand in the ids that `expand_image_tokens` makes of these."""
    remaining, added = iter(grids), 0
    for at, token in enumerate(ids):
        if token == image_token:
            rows, columns = next(remaining)
            yield range(at + added, at + added + rows * columns)
            added += rows * columns - 1


def compute_positions(ids: Sequence[int], grids: Sequence[Grid], image_token: int) -> NDArray[np.int64]:
    """Return the positions (3, tokens) of a prompt whose images are still one placeholder each.

    A text token has the same position in time, height and width. An image's tokens share one time, and their rows and columns count up
    from it; the text after an image goes on after its longer side (Qwen2-VL report, arXiv:2409.12191, section 2.1).
    """
    positions, remaining, start = [], iter(grids), 0
    for token in ids:
        if token == image_token:
            rows, columns = next(remaining)
            row, column = np.divmod(np.arange(rows * columns), columns)
            positions.append(start + np.stack([np.zeros_like(row), row, column]))
            start += max(rows, columns)
        else:
            positions.append(np.full((3, 1), start))
            start += 1
    return np.concatenate(positions, axis=1)
