"""The model families on tiny random checkpoints: prompts, positions, answers and pages compared with transformers' own.

LoRA adapters and contexts beyond 32,768 tokens run for real.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from pipeline import engines
from pipeline.budget import PixelBudget
from pipeline.demo import quantize
from pipeline.engines.model_files import describe_a4_page, resolve_cell_px
from pipeline.engines.transformers import TransformersEngine
from pipeline.errors import JobError
from pipeline.records import Completion, Message, Request, Sampling
from pipeline.schema import prompt
from pipeline.stages import preview
from tests.support import tiny_checkpoint
from tests.support.requests import FLAT, make_noise
from tests.support.tiny_checkpoint import CONTROL, FAMILIES, VOCABULARY
from tests.support.workspace import Workspace
from tests.unit.stages.test_preview import ODD

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 reads it
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp(family), family=family)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(str(folder), threads=1, batch_size=4)
    yield engine
    engine.close()


def make_request(cell_px: int, key: int = 0, schema: str = "", max_tokens: int = 40, pages: int = 2) -> Request:
    images = [make_noise(key + at, cell_px * (2 + key % 3), cell_px * 3) for at in range(pages)]
    return Request(str(key), prompt.build_messages(f"System {key}.", images), schema, Sampling(max_tokens=max_tokens))


def complete_all(engine: TransformersEngine, *requests: Request) -> list[Completion]:
    async def gather() -> list[Completion]:
        return await asyncio.gather(*map(engine.complete, requests))

    return asyncio.run(gather())


def generate(network: Any, encoder: Any, request: Request) -> str:
    """Return what transformers' own `generate` answers to a request without a schema."""
    made, words = encoder.encode(request.messages), encoder._tokenizer
    control = set(words.convert_tokens_to_ids(list(CONTROL))) - {words.eos_token_id}
    ids = torch.tensor([made.ids])
    with torch.no_grad():
        written = network.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == network.config.image_token_id).int(),
            suppress_tokens=[*control, *range(len(words), VOCABULARY)],
            do_sample=False,
            max_new_tokens=request.sampling.max_tokens,
            **encoder.build_pixel_values(made.images),
        )[0, len(made.ids) :].tolist()
    return str(words.decode(written, skip_special_tokens=True))


# --- Prompts


def test_the_prompt_is_that_of_the_familys_own_processor(engine: TransformersEngine, folder: Path, family: str) -> None:
    image, encoder = make_noise(3, 3 * FAMILIES[family], 4 * FAMILIES[family]), engine._model.encoder
    turns = [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Go."}]},
    ]
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], images=[Image.fromarray(image)], do_resize=False, return_tensors="pt")
    made = encoder.encode((Message("system", ("Read.",)), Message("user", (image, "Go."))))
    assert made.ids == expected["input_ids"][0].tolist()
    assert torch.equal(encoder.build_pixel_values(made.images)["pixel_values"], expected["pixel_values"])


def test_positions_are_those_of_the_familys_own_code(engine: TransformersEngine, family: str) -> None:
    made = engine._model.encoder.encode(make_request(FAMILIES[family], 2, pages=3).messages)
    ids = torch.tensor([made.ids])
    kinds = (ids == engine._model.network.config.image_token_id).int()
    grids = engine._model.encoder.build_pixel_values(made.images)["image_grid_thw"]
    expected, _ = engine._model.network.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
    assert np.array_equal(made.positions, expected[:, 0].numpy())


# --- Answers


def test_answers_are_those_of_transformers_own_generate(engine: TransformersEngine, family: str) -> None:
    request = make_request(FAMILIES[family])
    expected = generate(engine._model.network, engine._model.encoder, request)
    (answer,) = complete_all(engine, request)
    assert answer.text == expected
    assert len(answer.tokens) == request.sampling.max_tokens


def test_a_page_decides_the_answer(engine: TransformersEngine, family: str) -> None:
    """Otherwise the tests above could pass without a vision tower."""
    cell = FAMILIES[family]
    white, black = (
        Request("k", prompt.build_messages("Read.", [np.full((2 * cell, 2 * cell, 3), shade, np.uint8)]), "", Sampling(max_tokens=40))
        for shade in (255, 0)
    )
    one, other = complete_all(engine, white, black)
    assert one.text != other.text


def test_a_batch_answers_as_each_request_alone(engine: TransformersEngine, family: str) -> None:
    requests = [make_request(FAMILIES[family], key, FLAT, 120, pages=1 + key % 2) for key in range(4)]
    together = [answer.text for answer in complete_all(engine, *requests)]
    assert together == [complete_all(engine, request)[0].text for request in requests]
    assert all(json.loads(text) for text in together)


def test_a_prompt_that_is_read_in_parts_gives_the_same_answer(engine: TransformersEngine, folder: Path, family: str) -> None:
    requests = [make_request(FAMILIES[family], key, FLAT, 60, pages=1 + 2 * key) for key in range(3)]
    parted = TransformersEngine(str(folder), threads=1, batch_size=4, part_tokens=20)
    network, widths = parted._model.network.model.language_model, list[int]()
    network.register_forward_hook(lambda _m, _a, out: widths.append(out.last_hidden_state.shape[1]))
    for whole, found in zip(complete_all(engine, *requests), complete_all(parted, *requests), strict=True):
        assert found.text == whole.text
        assert [token.logprob for token in found.tokens] == pytest.approx([token.logprob for token in whole.tokens], abs=1e-4)
    parted.close()
    assert max(widths) <= 20 + 3 * 4  # the text before a page's 12 tokens may fill the budget


def test_an_awq_copy_answers_as_its_unpacked_weights(folder: Path, family: str, tmp_path: Path) -> None:
    """Names and shapes of every family pass through the packed layout."""
    quantize.quantize_checkpoint(folder, tmp_path / "awq")
    engine = TransformersEngine(str(tmp_path / "awq"), threads=1)
    try:
        request = make_request(FAMILIES[family])
        (answer,) = complete_all(engine, request)
        assert answer.text == generate(engine._model.network, engine._model.encoder, request)
    finally:
        engine.close()


# --- Pages


@pytest.mark.parametrize("name", ODD)
def test_a_previewed_page_is_one_that_the_familys_processor_leaves_alone(
    workspace: Workspace, folder: Path, family: str, name: str
) -> None:
    job = resolve_cell_px(workspace.job(f"model.name={folder}", "model.without_gpu=cpu"))
    preview.write_preview_png(seen := preview.render_preview(job, workspace.put("odd", ODD[name]), 1), workspace.folder / "seen.png")
    with Image.open(workspace.folder / "seen.png") as image:
        processor = AutoProcessor.from_pretrained(folder).image_processor
        size = {"shortest_edge": job.budget.min_pixels, "longest_edge": job.budget.max_pixels}
        grid = processor(images=[image.convert("RGB")], size=size, return_tensors="pt")["image_grid_thw"][0].tolist()
        patch = FAMILIES[family] // 2
        assert (grid[1] * patch, grid[2] * patch) == (image.size[1], image.size[0])
    assert seen.facts["visual_tokens"] == grid[1] * grid[2] // 4


def test_a4_pages_are_counted_in_the_familys_own_tokens(workspace: Workspace, folder: Path, family: str) -> None:
    found = describe_a4_page(workspace.job(f"model.name={folder}"))
    processor = AutoProcessor.from_pretrained(folder).image_processor
    size = {"shortest_edge": 200_704, "longest_edge": 1_003_520}
    page = np.zeros((2339, 1653, 3), np.uint8)  # A4 at 200 dpi
    _, rows, columns = processor(images=[page], size=size, return_tensors="pt")["image_grid_thw"][0].tolist()
    assert (found["cell_px"], found["cell_px_from"]) == (FAMILIES[family], "checkpoint")
    assert (found["visual_tokens"], found["height_px"]) == (rows * columns // 4, rows * FAMILIES[family] // 2)


def test_a_run_plans_pages_for_its_own_checkpoint(workspace: Workspace, folder: Path, family: str) -> None:
    job = workspace.job(f"model.name={folder}", "model.without_gpu=cpu")
    resolved = engines.resolve_engine(job, 0.0)
    assert resolved.budget == PixelBudget(cell_px=FAMILIES[family])
    assert job.with_resolved_model(resolved.dump_keys()["model"]).fingerprint == resolved.fingerprint
    assert (resolved.fingerprint == job.fingerprint) == (FAMILIES[family] == 28)  # outputs of older versions keep their fingerprint


def test_a_job_that_says_another_size_than_its_checkpoint_is_refused(workspace: Workspace, folder: Path, family: str) -> None:
    with pytest.raises(JobError, match=rf"model\.cell_px is 40, but a visual token of .* is {FAMILIES[family]}x{FAMILIES[family]} px"):
        engines.resolve_engine(workspace.job(f"model.name={folder}", "model.without_gpu=cpu", "model.cell_px=40"), 0.0)


# --- Adapters


def add_adapter(folder: Path, target: Path) -> Path:
    """Write a random LoRA adapter of a checkpoint's language model into a folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText
    torch.manual_seed(7)
    wanted = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)", init_lora_weights=False)
    adapted = get_peft_model(loader.from_pretrained(folder), wanted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(4)
    adapted.save_pretrained(target)
    return target


@needs_peft
def test_an_adapter_changes_the_answers_as_peft_does(engine: TransformersEngine, folder: Path, family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    adapter, request = add_adapter(folder, tmp_path / "adapter"), make_request(FAMILIES[family])
    adapted = TransformersEngine(str(folder), threads=1, lora=adapter)
    try:
        (plain,), (answer,) = complete_all(engine, request), complete_all(adapted, request)
        loader: Any = AutoModelForImageTextToText
        beside: Any = PeftModel.from_pretrained(loader.from_pretrained(folder), adapter)  # not merged: applied in each pass
        assert answer.text == generate(beside, adapted._model.encoder, request)
        assert answer.text != plain.text
    finally:
        adapted.close()


@needs_peft
def test_an_adapter_for_other_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    """peft would warn, and answer as if there were no adapter."""
    adapter = add_adapter(folder, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name.replace("layers.0.", "layers.9."): weight for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(JobError, match=r"model\.lora: .*adapter lacks weights for this model: .*layers\.0\."):
        TransformersEngine(str(folder), threads=1, lora=adapter)


@needs_peft
def test_an_adapter_with_the_names_of_older_versions_is_the_same(folder: Path, family: str, tmp_path: Path) -> None:
    adapter, request = add_adapter(folder, tmp_path / "adapter"), make_request(FAMILIES[family])
    file, texts = adapter / "adapter_model.safetensors", []
    for weights in (load_file(file), {name.replace("language_model.", ""): weight for name, weight in load_file(file).items()}):
        save_file(weights, file)
        engine = TransformersEngine(str(folder), threads=1, lora=adapter)
        texts.append(complete_all(engine, request)[0].text)
        engine.close()
    assert texts[0] == texts[1]


# --- Long contexts


@pytest.mark.parametrize("long", ["qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_beyond_32768_tokens_is_answered_as_by_generate(long: str, tmp_path: Path) -> None:
    """YaRN stretches 8,192 trained tokens to 40,960; a prompt of more than 32,768 is answered, and otherwise than without YaRN."""
    from transformers import AutoModelForImageTextToText

    folder = tiny_checkpoint.build_checkpoint(tmp_path / long, family=long)
    yarn = {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 8192}
    messages = prompt.build_messages("Read. " * 5600, [make_noise(1, 2 * FAMILIES[long], 3 * FAMILIES[long])])
    request = Request("k", messages, "", Sampling(max_tokens=12))
    texts = {}
    for name, scaling in (("stretched", yarn), ("plain", None)):
        engine = TransformersEngine(str(folder), threads=2, rope_scaling=scaling, max_model_len=None if scaling else 40_960)
        try:
            assert engine.max_model_len == 40_960
            (answer,) = complete_all(engine, request)
            assert answer.usage.prompt_tokens > 32_768
            texts[name] = answer.text
            if scaling:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    config = engine._model.network.config
                    loader: Any = AutoModelForImageTextToText
                    theirs = loader.from_pretrained(folder, config=type(config).from_dict(config.to_dict()), attn_implementation="sdpa")
                assert answer.text == generate(theirs, engine._model.encoder, request)
        finally:
            engine.close()
    assert texts["stretched"] != texts["plain"]
