"""Damaged checkpoints: what `check_engine` refuses from the files alone, and what loading refuses after that."""

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
from pipeline.engines import checkpoint_files
from pipeline.engines.model_files import DEMO_CHECKPOINT
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


def make_job(workspace: Workspace, checkpoint: Path, damage: Damage) -> Job:
    """Return a job whose model is a damaged copy of a checkpoint."""
    damage(Path(shutil.copytree(checkpoint, workspace.folder / "mine")))
    return workspace.job("model.name=./mine", "model.without_gpu=cpu")


def write_text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate_weights(size_bytes: int) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size_bytes])


def edit_config(**changes: Any) -> Damage:
    """Change config.json; `text_config__hidden_size` is the key `hidden_size` of the object `text_config`."""

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


def edit_weight(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Damage:
    """Change a tensor, or remove it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        old = tensors.pop(name)
        save_file(tensors | ({name: change(old).contiguous()} if change else {}), folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def use_index(named: Any) -> Damage:
    """Rename the weights file to the first of two and write an index."""

    def damage(folder: Path) -> None:
        shutil.move(folder / WEIGHTS, folder / "model-00001-of-00002.safetensors")
        (folder / checkpoint_files.INDEX).write_text(json.dumps(named))

    return damage


BOTH = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(("damage", "sentence"), [
    (remove("config.json"), r"/mine holds no checkpoint \(no config\.json\)"),
    (write_text("config.json", '{"model_type": '), r"mine/config\.json is not JSON: .* column 16"),
    (write_text("config.json", "[]"), r"mine/config\.json: expected a JSON object, found list"),
    (edit_config(model_type="llama"), "mine: model_type is 'llama'; allowed: qwen3_vl, qwen2_5_vl, qwen2_vl"),
    (edit_config(quantization_config={"quant_method": "gptq"}), "quantization by 'gptq'; allowed are none and 'awq'"),
    (remove("tokenizer.json"), r"its tokenizer is missing: there is no tokenizer\.json and no vocab\.json with merges\.txt"),
    (remove("processor_config.json"), r"its image processor is missing: there is no preprocessor_config\.json and no processor_config"),
    (write_text("tokenizer.json", '{"version": "1.0", '), r"mine/tokenizer\.json is not JSON"),
    (remove(WEIGHTS), r"mine: it holds no weights: no \.safetensors file"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "it holds no weights: .* other weight files are not read"),
    (lambda folder: (folder / WEIGHTS).write_bytes(LFS), r"is not a safetensors file \(69 bytes that begin with b'version '\)"),
    (truncate_weights(1_000_000), r"model\.safetensors is damaged or incomplete \(1,000,000 bytes\): .*incomplete.*; fetch it again"),
    (truncate_weights(500), r"model\.safetensors is damaged or incomplete \(500 bytes\): .*header.*; fetch it again"),
    (truncate_weights(0), r"model\.safetensors is not a safetensors file \(0 bytes that begin with b''\)"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"\2\0\0\0\0\0\0\0[]"), r"is not a safetensors file \(10 bytes that begin with b'.x02"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"\2\0\0\0\0\0\0\0{]"), r"is damaged or incomplete \(10 bytes\): .*JSON"),
    (use_index(BOTH), r"the weights file model-00002-of-00002\.safetensors is missing \(of 2 that .*index\.json names, 1 are\)"),
    (use_index({}), r"index\.json: it has no weight_map"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_before_anything_starts(workspace: Workspace, plain: Path, damage: Damage, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        engines.check_engine(make_job(workspace, plain, damage))


def test_an_unreadable_weights_file_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(JobError, match=r"model\.safetensors cannot be read: Is a directory"):
        checkpoint_files.read_safetensors_header(tmp_path / WEIGHTS)


def test_intact_checkpoints_pass(workspace: Workspace, plain: Path, quantized: Path) -> None:
    assert engines.check_engine(make_job(workspace, plain, lambda _: None)) == ()
    checkpoint_files.check_checkpoint_files(quantized)
    checkpoint_files.check_checkpoint_files(DEMO_CHECKPOINT)


def test_shapes_are_read_from_the_headers(plain: Path) -> None:
    assert checkpoint_files.read_tensor_shapes(plain) == {name: tuple(tensor.shape) for name, tensor in load_file(plain / WEIGHTS).items()}


@pytest.mark.parametrize(("damage", "sentence"), [
    (edit_weight(QUERY + "weight", lambda tensor: tensor[:64]), r"weight model.* is \(64, 128\), config\.json asks for \(128, 128\)"),
    (edit_weight("visual.patch_embed.proj.weight", lambda tensor: tensor[:32]), r"patch_embed.* is \(32, .*, config\.json asks for \(64,"),
    (edit_weight(QUERY + "bias", None), "mine: the checkpoint lacks weights: .*q_proj.bias"),
    (edit_config(text_config=None), r"lm_head\.weight is \(192, 128\), config\.json asks for \(152064,"),
    (edit_config(text_config__hidden_size="big"), "config.json cannot be used: .*'hidden_size'"),
    (edit_config(text_config__num_attention_heads=7), r"config\.json describes no model that can be built: .* divisible by num_heads"),
    (write_text("tokenizer.json", "{}"), "tokenizer or image processor cannot be read"),
    (remove("chat_template.jinja"), "its chat template cannot ask about a page"),
    (write_text("chat_template.jinja", "{{ messages[0]['content'] }}"), "about a page: the chat template shows 0 of 1 images"),
])  # fmt: skip
def test_loading_refuses_the_rest_before_the_weights_are_in_memory(
    workspace: Workspace, plain: Path, damage: Damage, sentence: str
) -> None:
    damaged = make_job(workspace, plain, damage)
    engines.check_engine(damaged)
    with pytest.raises(JobError, match=sentence):
        engines.load_engine(damaged, threads=1)


@pytest.mark.parametrize(("damage", "sentence"), [
    (edit_weight(QUERY + "qweight", lambda tensor: tensor[:64]), r"q_proj\.qweight is \(64, 16\), config\.json asks for \(128, 16\)"),
    (edit_weight(QUERY + "scales", lambda tensor: tensor[:, :64]), r"q_proj\.scales is \(1, 64\), config\.json asks for \(1, 128\)"),
    (edit_weight(QUERY + "qzeros", None), "the checkpoint lacks weights: .*q_proj"),
    (edit_config(quantization_config__group_size=0), "config.json says group_size 0; allowed are whole numbers from 1"),
    (edit_config(quantization_config__bits=8), "'bits': 8}; allowed are .* 4 bits"),
])  # fmt: skip
def test_packed_weights_are_compared_with_the_config_too(workspace: Workspace, quantized: Path, damage: Damage, sentence: str) -> None:
    with pytest.raises(JobError, match=sentence):
        engines.load_engine(make_job(workspace, quantized, damage), threads=1)


def test_an_unforeseen_error_is_one_sentence_that_names_the_model(workspace: Workspace, plain: Path) -> None:
    damaged = make_job(workspace, plain, write_text("generation_config.json", '{"eos_token_id": "end"}'))
    with pytest.raises(RunError, match=r"^the model \./mine does not load: TypeError: [^\n]+$"):
        engines.load_engine(damaged, threads=1)


@pytest.mark.parametrize("adapter", ["./gone", "in"])
def test_a_folder_without_an_adapter_is_refused(workspace: Workspace, adapter: str) -> None:
    with pytest.raises(JobError, match=rf"model\.lora is '{adapter}', but .* holds no adapter_model\.safetensors"):
        engines.check_engine(workspace.job(f"model.lora={adapter}"))


def test_a_git_lfs_pointer_as_adapter_is_refused(workspace: Workspace) -> None:
    (workspace.inputs / "adapter_model.safetensors").write_bytes(LFS)
    with pytest.raises(JobError, match=r"adapter_model\.safetensors is not a safetensors file"):
        engines.check_engine(workspace.job("model.lora=in"))


def test_the_home_of_an_unknown_user_is_a_missing_folder(workspace: Workspace) -> None:
    with pytest.raises(JobError, match="holds no checkpoint"):
        engines.check_engine(workspace.job("model.name=~nobody-at-all/model"))
