"""Pages for vLLM: the same patches, places and names as from its own processor, for each model family."""

from __future__ import annotations

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLImageProcessor

from pipeline.engines import checkpoint
from pipeline.engines.encoding import Encoder
from pipeline.engines.vllm.launch import NORMALIZE, list_known_arguments
from pipeline.engines.vllm.pages import PageCutter, cut_patches, normalize_patches
from pipeline.schema import prompt
from tests.support import tiny_checkpoint
from tests.support.requests import make_noise
from tests.support.tiny_checkpoint import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports cause many, none of them by this package
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


@pytest.mark.parametrize(("patch_px", "merge"), [(14, 2), (16, 2), (14, 1)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (5, 1)])
def test_patches_are_those_of_the_image_processor(patch_px: int, merge: int, rows: int, columns: int) -> None:
    page = make_noise(1, rows * merge * patch_px, columns * merge * patch_px)
    processor = Qwen2VLImageProcessor(patch_size=patch_px, merge_size=merge, do_resize=False, do_rescale=False, do_normalize=False)
    expected = processor(images=[page], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert torch.equal(torch.from_numpy(cut_patches([page], patch_px, merge)), expected.to(torch.uint8))


def test_patches_are_normalized_as_by_the_image_processor() -> None:
    page, moments = make_noise(1, 112, 84), ((0.48, 0.45, 0.4), (0.27, 0.26, 0.28))
    processor = Qwen2VLImageProcessor(do_resize=False, image_mean=moments[0], image_std=moments[1])
    expected = processor(images=[page], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    torch.testing.assert_close(normalize_patches(torch.from_numpy(cut_patches([page], 14, 2)), *moments), expected)


def test_a_page_that_nobody_may_write_to_is_cut() -> None:
    page = make_noise(1, 56, 28)
    page.flags.writeable = False
    assert cut_patches([page], 14, 2).shape == (8, 1176)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_is_that_of_vllms_own_processor(family: str, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    cell = FAMILIES[family]
    folder = tiny_checkpoint.build_checkpoint(tmp_path, family=family)
    processor = checkpoint.load_processor(folder)
    size = {"shortest_edge": cell**2, "longest_edge": 64 * cell**2}
    config = EngineArgs(
        model=str(folder), max_model_len=4096, mm_processor_cache_gb=0, mm_processor_kwargs={"size": size}
    ).create_engine_config()
    image_token = checkpoint.load_config(folder, None).image_token_id
    pages = [make_noise(at, cell * (2 + at), cell * 3) for at in range(2)]
    encoded = Encoder(processor, image_token, torch.device("cpu")).encode(prompt.build_messages("Read.", pages))
    cutter = PageCutter.of_processor(processor.image_processor, None if NORMALIZE in list_known_arguments() else config.model_config.dtype)
    renderer = renderer_from_config(config)
    seen = {"multi_modal_data": {"image": pages}, "multi_modal_uuids": {"image": ["a", "b"]}}
    parsed = parse_model_prompt(config.model_config, {"prompt_token_ids": encoded.unexpanded_ids, **seen})
    [theirs], ours = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params), cutter.build_input(encoded, ["a", "b"])
    assert describe(ours) == describe(theirs)
    assert cutter.build_input(encoded, [])["mm_hashes"] == {"image": [hashlib.sha256(page).hexdigest() for page in pages]}


def describe(made: Any) -> Any:
    """Return what an input of vLLM's engine says."""
    items = [
        {name: (element.data.dtype, element.data.tolist(), element.field.keep_on_cpu) for name, element in item.items()}
        for item in made["mm_kwargs"]["image"]
    ]
    places = [(place.offset, place.length, place.is_embed) for place in made["mm_placeholders"]["image"]]
    return made["type"], made["prompt_token_ids"], made["mm_hashes"], places, items
