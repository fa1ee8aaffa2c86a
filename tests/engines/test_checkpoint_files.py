"""Damaged checkpoints: what a glance at the folder tells before anything starts, and what loading it tells after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import engines
from pipeline.demo import quantize
from pipeline.engines import DEMO_CHECKPOINT, checkpoint_files
from pipeline.errors import JobError, RunError
from pipeline.job import Job
from tests.support import tiny_checkpoint
from tests.support.workspace import Workspace

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"
QUERY = "model.layers.0.self_attn.q_proj."
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2415968\n"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.build_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def quantized(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    quantize.quantize_checkpoint(plain, folder)
    return folder


def job(workspace: Workspace, sound: Path, damage: Damage) -> Job:
    """Return a job whose model is a damaged copy of a sound one."""
    damage(Path(shutil.copytree(sound, workspace.folder / "mine")))
    return workspace.job("model.name=./mine", "model.without_gpu=cpu")


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def gone(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(size_bytes: int) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size_bytes])


def config(**changes: Any) -> Damage:
    """Change config.json; `text_config__hidden_size` is a key within another."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *sections, key = name.split("__")
            part = content
            for section in sections:
                part = part[section]
            part[key] = value
        (folder / "config.json").write_text(json.dumps(content))

    return damage


def weight(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Damage:
    """Change a tensor, or take it out."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        old = tensors.pop(name)
        save_file(tensors | ({name: change(old).contiguous()} if change else {}), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def index(named: Any) -> Damage:
    """Put an index in place of the one weights file, of which there are two then."""

    def damage(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder / "model-00001-of-00002.safetensors")
        (folder / checkpoint_files.INDEX).write_text(json.dumps(named))

    return damage


BOTH = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(("damage", "sentence"), [
    (gone("config.json"), r"/mine holds no checkpoint \(no config\.json\)"),
    (text("config.json", '{"model_type": '), r"mine/config\.json is not JSON: .* column 16"),
    (text("config.json", "[]"), r"mine/config\.json: expected a JSON object, found list"),
    (config(model_type="llama"), "mine: model_type is 'llama'; allowed: qwen2_5_vl, qwen2_vl"),
    (config(quantization_config={"quant_method": "gptq"}), "quantization by 'gptq'; allowed are none and 'awq'"),
    (gone("tokenizer.json"), r"its tokenizer is missing: there is no tokenizer\.json and no vocab\.json with merges\.txt"),
    (gone("processor_config.json"), r"its image processor is missing: there is no preprocessor_config\.json and no processor_config\.json"),
    (text("tokenizer.json", '{"version": "1.0", '), r"mine/tokenizer\.json is not JSON"),
    (gone(WEIGHTS), r"mine: it holds no weights: no \.safetensors file"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "it holds no weights: .* other weight files are not read"),
    (lambda folder: (folder / WEIGHTS).write_bytes(LFS), r"it is no safetensors file \(69 bytes that begin with b'version '\)"),
    (cut(1_000_000), r"model\.safetensors: it is damaged: 1,000,000 bytes long, 2,41\d,\d+ by its own header; fetch it again"),
    (cut(500), r"model\.safetensors: it is damaged: it ends in its header, after 500 bytes"),
    (cut(0), r"model\.safetensors: it is no safetensors file \(0 bytes"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"\2\0\0\0\0\0\0\0[]"), r"its header is not that of a safetensors file"),
    (index(BOTH), r"the weights file model-00002-of-00002\.safetensors is missing \(of 2 that .*index\.json names, 1 are\)"),
    (index({}), r"index\.json: it has no weight_map"),
])  # fmt: skip
def test_a_glance_tells_before_anything_starts(workspace: Workspace, plain: Path, damage: Damage, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        engines.check_engine(job(workspace, plain, damage))


def test_a_weights_file_that_is_unreadable_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(JobError, match=r"model\.safetensors cannot be read: Is a directory"):
        checkpoint_files.read_safetensors_header(tmp_path / WEIGHTS)


def test_sound_checkpoints_pass(workspace: Workspace, plain: Path, quantized: Path) -> None:
    assert engines.check_engine(job(workspace, plain, lambda _: None)) == ()
    checkpoint_files.check_checkpoint_files(quantized)
    checkpoint_files.check_checkpoint_files(DEMO_CHECKPOINT)


def test_the_headers_know_every_shape(plain: Path) -> None:
    assert checkpoint_files.read_tensor_shapes(plain) == {name: tuple(tensor.shape) for name, tensor in load_file(plain / WEIGHTS).items()}


@pytest.mark.parametrize(("damage", "sentence"), [
    (weight(QUERY + "weight", lambda tensor: tensor[:64]), r"weight model\.layers\.0.* is \(64, 128\), config\.json asks for \(128, 128\)"),
    (weight("visual.patch_embed.proj.weight", lambda tensor: tensor[:32]), r"patch_embed.* is \(32, .*, config\.json asks for \(64,"),
    (weight(QUERY + "bias", None), "mine: the checkpoint lacks weights: .*q_proj.bias"),
    (config(text_config=None), r"lm_head\.weight is \(192, 128\), config\.json asks for \(152064,"),
    (config(text_config__hidden_size="big"), "config.json cannot be used: .*'hidden_size'"),
    (config(text_config__num_attention_heads=7), r"config\.json describes no model that can be built: .* divisible by num_heads"),
    (text("tokenizer.json", "{}"), "tokenizer or image processor cannot be read"),
    (gone("chat_template.jinja"), "its chat template cannot ask about a page"),
    (text("chat_template.jinja", "{{ messages[0]['content'] }}"), "about a page: the chat template shows 0 of 1 images"),
])  # fmt: skip
def test_loading_tells_the_rest_before_the_weights_are_in_memory(workspace: Workspace, plain: Path, damage: Damage, sentence: str) -> None:
    damaged = job(workspace, plain, damage)
    engines.check_engine(damaged)
    with pytest.raises(JobError, match=sentence):
        engines.load_engine(damaged, threads=1)


@pytest.mark.parametrize(("damage", "sentence"), [
    (weight(QUERY + "qweight", lambda tensor: tensor[:64]), r"q_proj\.qweight is \(64, 16\), config\.json asks for \(128, 16\)"),
    (weight(QUERY + "scales", lambda tensor: tensor[:, :64]), r"q_proj\.scales is \(1, 64\), config\.json asks for \(1, 128\)"),
    (weight(QUERY + "qzeros", None), "the checkpoint lacks weights: .*q_proj"),
    (config(quantization_config__group_size=0), "config.json says group_size 0; allowed are whole numbers from 1"),
    (config(quantization_config__bits=8), "'bits': 8}; allowed are .* 4 bits"),
])  # fmt: skip
def test_packed_weights_are_held_against_the_config_too(workspace: Workspace, quantized: Path, damage: Damage, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        engines.load_engine(job(workspace, quantized, damage), threads=1)


def test_what_nobody_foresaw_is_one_sentence_that_names_the_model(workspace: Workspace, plain: Path) -> None:
    damaged = job(workspace, plain, text("generation_config.json", '{"eos_token_id": "end"}'))
    with pytest.raises(RunError, match=r"^the model \./mine does not load: TypeError: [^\n]+$"):
        engines.load_engine(damaged, threads=1)


@pytest.mark.parametrize("adapter", ["./gone", "in"])
def test_a_folder_without_an_adapter_is_refused(workspace: Workspace, adapter: str) -> None:
    with pytest.raises(JobError, match=rf"model\.lora is '{adapter}', but .* holds no adapter_model\.safetensors"):
        engines.check_engine(workspace.job(f"model.lora={adapter}"))


def test_an_adapter_that_broke_off_is_refused(workspace: Workspace) -> None:
    (workspace.inputs / "adapter_model.safetensors").write_bytes(LFS)
    with pytest.raises(JobError, match=r"adapter_model\.safetensors: it is no safetensors file"):
        engines.check_engine(workspace.job("model.lora=in"))


def test_the_home_of_nobody_is_a_folder_that_is_not_there(workspace: Workspace) -> None:
    with pytest.raises(JobError, match="holds no checkpoint"):
        engines.check_engine(workspace.job("model.name=~nobody-at-all/model"))
