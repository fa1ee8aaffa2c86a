"""Pages for vLLM: an encoded prompt in, the input of vLLM's engine out, as its own image processor would make it.

    ids with one placeholder, a page of 56 x 84 px  ->  ids with 6, 24 patches of 1,176 bytes, where they stand, the page's name

vLLM's processor takes 10 ms of CPU for a page of 1,280 visual tokens, because it goes through PIL, checks for sizes that pages here never
have, and moves single bytes. The patches are the same (`tests/vllm/test_vllm_pages.py`): bytes, which vLLM normalises in the model, or
numbers for a vLLM that does not (0.24 is one).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.engines.encoding import EncodedPrompt
from pipeline.records import Pixels

FRAMES = 2
"""Qwen-VL's vision tower reads two frames of a film at once, and a page as two equal ones."""


@dataclass(frozen=True)
class PageCutter:
    """What a checkpoint says of its images."""

    patch_px: int
    merge: int
    """Patches of a visual token in a row, and in a column."""
    mean: tuple[float, ...]
    """Of red, green and blue, of 1."""
    deviation: tuple[float, ...]
    dtype: torch.dtype | None = None
    """The model's, in which patches are normalised here; None where vLLM normalises them."""

    @classmethod
    def of_processor(cls, images: Any, dtype: torch.dtype | None = None) -> PageCutter:
        """Return the cutter that does what a checkpoint's image processor does."""
        return cls(int(images.patch_size), int(images.merge_size), tuple(images.image_mean), tuple(images.image_std), dtype)

    def build_input(self, prompt: EncodedPrompt, page_ids: Sequence[str]) -> dict[str, Any]:
        """Return a prompt with images as vLLM's engine takes it after its processor.

        `page_ids` tell the images of all requests apart; without them the pixels' digests do.
        """
        from vllm.inputs import mm_input
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

        names = list(page_ids) if len(page_ids) == len(prompt.images) else [hashlib.sha256(page.data).hexdigest() for page in prompt.images]
        grids = torch.tensor([[1, page.shape[0] // self.patch_px, page.shape[1] // self.patch_px] for page in prompt.images])
        patches = torch.from_numpy(cut_patches(prompt.images, self.patch_px, self.merge))
        patches = normalize_patches(patches, self.mean, self.deviation).to(self.dtype) if self.dtype else patches
        sizes = grids.prod(1)
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", sizes),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        items = MultiModalKwargsItems.from_hf_inputs({"pixel_values": patches, "image_grid_thw": grids}, fields)
        places = [PlaceholderRange(offset=span.start, length=len(span)) for span in prompt.image_spans]
        made: dict[str, Any] = mm_input(prompt.ids, items, {"image": names}, {"image": places})
        return made


def cut_patches(pages: Sequence[Pixels], patch_px: int, merge: int) -> NDArray[np.uint8]:
    """Return the patches of pages, (patches, 3 * FRAMES * patch_px * patch_px), those of one visual token in a row.

    A patch has the rows of its red values, twice, then green and blue. Its rows are moved whole: 2 ms of CPU for 1,280 visual tokens.
    """
    cells = [(page.shape[0] // (merge * patch_px), page.shape[1] // (merge * patch_px)) for page in pages]
    tokens = sum(rows * columns for rows, columns in cells)
    all_patches, start = np.empty((tokens, merge, merge, 3, FRAMES, patch_px), f"V{patch_px}"), 0
    for page, (rows, columns) in zip(pages, cells, strict=True):
        lines = np.ascontiguousarray(page.transpose(2, 0, 1)).view(f"V{patch_px}").reshape(3, rows, merge, patch_px, columns, merge)
        patches = all_patches[start : start + rows * columns].reshape(rows, columns, merge, merge, 3, FRAMES, patch_px)
        patches[..., 0, :] = lines.transpose(1, 4, 2, 5, 0, 3)
        start += rows * columns
    frames = all_patches.view(f"V{patch_px * patch_px}")
    frames[..., 1, :] = frames[..., 0, :]
    return all_patches.view(np.uint8).reshape(tokens * merge * merge, -1)


def normalize_patches(patches: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Return patches of bytes as float32: less the mean of their colour, divided by its deviation, both given of 1."""
    colours = patches.view(len(patches), 3, -1)
    mean_255, deviation_255 = (255 * torch.tensor(numbers).view(1, 3, 1) for numbers in (mean, deviation))
    return ((colours - mean_255) / deviation_255).view(len(patches), -1)
