"""Which GGUF files are read, and why others are refused."""

from __future__ import annotations

import logging
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.model import gguf_file as module
from lora_runtime.model.checkpoint import read_checkpoint, resolve_source
from lora_runtime.model.load import load_base
from server.settings import resolve_settings
from server.startup import load_runtime
from tests.gguf_files import Extra, tokenizer_for_chat, write_llama


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_llama(path)
    return path


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    """A copy of its own for each test."""
    return Path(shutil.copy(written, tmp_path / "tiny.gguf"))


def refusal(base: Path | str, gguf_file: str | None = None) -> str:
    with pytest.raises(BaseModelUnsupported) as caught:
        load_base(base, gguf_file=gguf_file, prepack=False)
    return str(caught.value)


def test_a_file_is_found_by_its_path_by_its_name_and_alone_in_its_folder(path: Path) -> None:
    by_path = resolve_source(path)
    assert by_path.gguf_file == by_path.name == "tiny.gguf"
    assert resolve_source(path, "tiny.gguf") == by_path
    assert resolve_source(path.parent, "tiny.gguf") == by_path
    assert resolve_source(path.parent) == by_path


def test_a_hub_repository_names_its_file() -> None:
    source = resolve_source("org/repository", "model.gguf")
    assert (source.place, source.gguf_file, source.name) == (
        "org/repository",
        "model.gguf",
        "org/repository/model.gguf",
    )


def test_a_checkpoint_beside_a_gguf_file_is_what_a_folder_means(path: Path) -> None:
    (path.parent / "config.json").write_text("{}")
    assert resolve_source(path.parent).gguf_file is None
    assert resolve_source(path.parent, "tiny.gguf").gguf_file == "tiny.gguf"


def test_of_many_files_one_has_to_be_named(path: Path) -> None:
    shutil.copy(path, path.with_name("other.gguf"))
    assert "2 GGUF files (other.gguf, tiny.gguf)" in refusal(path.parent)
    assert "--gguf-file" in refusal(path.parent)
    assert resolve_source(path.parent, "other.gguf").gguf_file == "other.gguf"


def test_the_server_takes_the_file_that_its_flag_names(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, path.with_name("other.gguf"))
    flags = {"base": str(path.parent), "gguf_file": "other.gguf", "adapters": str(tmp_path), "auth": "none"}
    fetcher: Any = None
    backend = load_runtime(resolve_settings(flags, {}), fetcher)
    try:
        assert backend.base_name == "other.gguf"
    finally:
        backend.close(0.0)


def test_a_file_that_is_not_there_or_is_another_is_refused(path: Path) -> None:
    assert "missing.gguf: there is no such file" in refusal(path.parent, "missing.gguf")
    assert "missing.gguf: there is no such file" in refusal(path.with_name("missing.gguf"))
    assert "names another, other.gguf" in refusal(path, "other.gguf")


def test_a_file_of_the_same_name_in_the_working_directory_is_not_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_llama(elsewhere / "tiny.gguf", tied=False)
    monkeypatch.chdir(elsewhere)
    model = read_checkpoint(resolve_source(path.parent, "tiny.gguf")).model
    assert model.config.tie_word_embeddings
    relative = read_checkpoint(resolve_source("tiny.gguf")).model
    assert not relative.config.tie_word_embeddings


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else find(name))
    assert f"needs {package}, not installed here: pip install 'multilora[gguf]'" in refusal(path)


def test_what_is_no_gguf_file_is_refused(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "tiny.gguf: is no GGUF file: it starts with b'vers' instead of b'GGUF'" in refusal(path)


def test_a_file_cut_short_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert f"is cut short: it has {len(whole) - 1000:,} bytes" in refusal(path)
    path.write_bytes(whole[:300])
    assert "its GGUF header cannot be read" in refusal(path)


def test_a_version_of_the_format_that_is_not_read_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    assert "GGUF v1" in refusal(path)


def test_a_part_of_a_file_is_refused(path: Path) -> None:
    part = path.rename(path.with_name("tiny-00001-of-00003.gguf"))
    assert "is one of 3 parts; merge them with llama-gguf-split --merge" in refusal(part)


@pytest.mark.parametrize("architecture", ["starcoder", "bert"])
def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path, architecture: str) -> None:
    write_llama(tmp_path / "tiny.gguf", architecture=architecture)
    message = refusal(tmp_path / "tiny.gguf")
    assert f"cannot read architecture '{architecture}' from this GGUF file" in message
    assert "safetensors" in message


def add_rope_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32))


def add_biases(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))


def add_scaling(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (add_rope_factors, "such as rope_freqs.weight, would change its answers"),
        (add_biases, "such as blk.0.attn_q.bias, would change its answers"),
        (add_scaling, "its rotary angles are scaled (linear, factor 4.0)"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(tmp_path: Path, extra: Extra, reason: str) -> None:
    write_llama(tmp_path / "tiny.gguf", extra=extra)
    message = refusal(tmp_path / "tiny.gguf")
    assert reason in message
    assert "safetensors" in message


def test_a_tokenizer_beside_the_file_is_preferred(path: Path) -> None:
    beside: Any = tokenizer_for_chat()
    beside.chat_template = "{{ 'mine' }}"
    beside.save_pretrained(path.parent)
    assert read_checkpoint(resolve_source(path)).tokenizer.chat_template == "{{ 'mine' }}"
    (path.parent / "tokenizer_config.json").unlink()
    assert "tokenizer.json lies beside the GGUF file without tokenizer_config.json" in refusal(path)


def test_a_tokenizer_of_another_base_is_refused(path: Path) -> None:
    larger: Any = tokenizer_for_chat()
    larger.add_tokens(["<extra>"])
    larger.save_pretrained(path.parent)
    assert "its tokenizer has 332 tokens, its embedding 331 rows" in refusal(path)


def test_a_way_of_splitting_text_that_is_not_known_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_llama(tmp_path / "tiny.gguf", split="smollm")
    with caplog.at_level(logging.WARNING):
        read_checkpoint(resolve_source(tmp_path / "tiny.gguf"))
    assert "(tokenizer.ggml.pre 'smollm') splits text" in caplog.text
    caplog.clear()
    write_llama(tmp_path / "known.gguf", split="qwen2")
    read_checkpoint(resolve_source(tmp_path / "known.gguf"))
    assert "splits text" not in caplog.text
