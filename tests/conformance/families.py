"""Tiny random bases: one checkpoint folder per architecture, with a tokenizer of its own.

Weights are drawn wide, so that every delta shows in the answer; widths are no multiple of 16, so that padding shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lora_runtime.types import TokenSequence

TEXTS: tuple[tuple[str, str | None], ...] = (
    ("short", None),
    ("what time does the train to the coast leave tomorrow morning", None),
    ("i would like to cancel my card", "please say which card you would like to cancel"),
    ("prices rose again in the third quarter though more slowly than the bank had feared last year", None),
    ("the end [PAD]", None),  # a padding token of the text's own, where there is one
)


def word_pieces(first: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of BERT's kind, whose words are those of the texts; `first` are its first tokens."""
    words = sorted({word for pair in TEXTS for text in pair if text for word in text.split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys((*first, *letters, *(f"##{c}" for c in letters), *words[::2]))
    pad, unknown, start, end, mask = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=start, sep_token=end, mask_token=mask,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def padded_second() -> PreTrainedTokenizerFast:
    """The word pieces with the padding token second, as RoBERTa has it: its positions start beyond that id."""
    return word_pieces(("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))


def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of GPT-2's kind: no padding token, nothing added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for pair in TEXTS for text in pair if text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class Family:
    """How one architecture's base is made, and what its projections are called."""

    model_class: str  # whose checkpoint is saved
    config: Mapping[str, object]
    attention: tuple[str, ...]  # suffixes of the query and value projections, or of what holds them
    linears: tuple[str, ...]  # suffixes of every linear layer of a block
    words: str  # suffix of the word embedding
    tokenizer: Callable[[], PreTrainedTokenizerFast] = word_pieces
    left_out: tuple[str, ...] = ()  # prefixes of parameters that the checkpoint does not have
    is_decoder: bool = False
    fan_in_fan_out: bool = False
    packed: bool = True  # whether attention runs on packed sequences


_ENCODER = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 52,
            "max_position_embeddings": 96}  # fmt: skip
_DECODER = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 10, "intermediate_size": 52, "max_position_embeddings": 96, "pad_token_id": None,
            "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
_BERT_LINEARS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0,
            "position_biased_input": False}  # fmt: skip
_DEBERTA_V3 = {**_DEBERTA, "share_att_key": True, "position_buckets": 6, "norm_rel_ebd": "layer_norm"}
_DEBERTA_LINEARS = (
    "query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"
)  # fmt: skip
_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "bert": Family("BertModel", _ENCODER, ("query", "value"), _BERT_LINEARS, "word_embeddings"),
    "roberta": Family(
        "RobertaModel", {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
        ("query", "value"), _BERT_LINEARS, "word_embeddings", padded_second,
    ),
    "distilbert": Family(
        "DistilBertModel",
        {"dim": 36, "n_layers": 2, "n_heads": 4, "hidden_dim": 52, "max_position_embeddings": 96},
        ("q_lin", "v_lin"), ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), "word_embeddings",
    ),
    "electra": Family(
        "ElectraModel", {**_ENCODER, "embedding_size": 20}, ("query", "value"),
        (*_BERT_LINEARS, "embeddings_project"), "word_embeddings",
    ),
    "deberta": Family(  # its base has the pooler, as a checkpoint fine-tuned on MNLI does
        "DebertaForSequenceClassification", _DEBERTA, ("in_proj", "pos_q_proj"),
        ("in_proj", "pos_proj", "pos_q_proj", "attention.output.dense", "intermediate.dense", "output.dense"),
        "word_embeddings", left_out=("classifier.",), packed=False,
    ),
    "deberta-v3": Family(
        "DebertaV2ForSequenceClassification", _DEBERTA_V3, ("query_proj", "value_proj"), _DEBERTA_LINEARS,
        "word_embeddings", left_out=("classifier.",), packed=False,
    ),
    "deberta-v2-conv": Family(
        "DebertaV2Model", {**_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}, ("query_proj", "value_proj"),
        (*_DEBERTA_LINEARS, "pos_key_proj", "pos_query_proj"), "word_embeddings", packed=False,
    ),
    "mpnet": Family(
        "MPNetModel", {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, ("attn.q", "attn.v"),
        ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"), "word_embeddings",
        padded_second, packed=False,
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        {**_ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2, "num_attention_heads": 3,
         "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
        ("Wqkv",), ("Wqkv", "Wo", "Wi"), "tok_embeddings",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 96, "n_inner": 52, "bos_token_id": 0,
         "eos_token_id": 0},
        ("c_attn",), ("c_attn", "c_proj", "c_fc"), "wte", byte_pairs, is_decoder=True, fan_in_fan_out=True,
    ),
    "llama": Family(
        "LlamaForCausalLM", {**_DECODER, "tie_word_embeddings": False}, ("q_proj", "v_proj"), _LLAMA_LINEARS,
        "embed_tokens", byte_pairs, is_decoder=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {**_DECODER, "tie_word_embeddings": True}, ("q_proj", "v_proj"),
        _LLAMA_LINEARS, "embed_tokens", byte_pairs, is_decoder=True,
    ),
    "qwen3": Family(  # norms of its own on queries and keys
        "Qwen3ForCausalLM", {**_DECODER, "tie_word_embeddings": False}, ("q_proj", "v_proj"), _LLAMA_LINEARS,
        "embed_tokens", byte_pairs, is_decoder=True,
    ),
    "mistral": Family(
        "MistralForCausalLM", {**_DECODER, "tie_word_embeddings": False, "sliding_window": 6}, ("q_proj", "v_proj"),
        _LLAMA_LINEARS, "embed_tokens", byte_pairs, is_decoder=True,
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        {**_ENCODER, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
        ("query_key_value",), ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"), "embed_in",
        byte_pairs, is_decoder=True,
    ),
    "gpt-neo": Family(  # its attention is its own
        "GPTNeoForCausalLM",
        {"hidden_size": 36, "num_layers": 2, "num_heads": 3, "intermediate_size": 52, "window_size": 6,
         "max_position_embeddings": 96, "attention_types": [[["global", "local"], 1]], "pad_token_id": None,
         "bos_token_id": 0, "eos_token_id": 0},
        ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"), "wte", byte_pairs,
        is_decoder=True, packed=False,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {**_DECODER, "tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 10,
         "layer_types": ["sliding_attention", "full_attention"]},
        ("q_proj", "v_proj"), _LLAMA_LINEARS, "embed_tokens", byte_pairs, is_decoder=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A family's checkpoint on disk, and the texts as its tokens."""

    name: str
    family: Family
    folder: Path
    sequences: tuple[TokenSequence, ...]
    vocab_size: int
    ids_in_texts: tuple[int, ...] = field(default=())  # in two texts or more, special tokens left out

    def pick_ids(self, count: int, seed: int) -> list[int]:
        """Token ids that the texts have, ascending."""
        return sorted(random.Random(seed).sample(self.ids_in_texts, count))


def build_base(name: str, root: Path, family: Family | None = None) -> Base:
    """Save the random base of a family, one of those above unless another is given, under `root`."""
    family = family or FAMILIES[name]
    folder = root / name
    tokenizer = family.tokenizer()
    model_class = getattr(transformers, family.model_class)
    config = model_class.config_class(vocab_size=len(tokenizer), **family.config)
    torch.manual_seed(sum(map(ord, name)))
    model: PreTrainedModel = model_class(config)
    _draw(model, 1.2 * config.hidden_size**-0.5)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(family.left_out or "\0")}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    return Base(name, family, folder, *_tokenise(folder))


def _draw(model: nn.Module, std: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))


def _tokenise(folder: Path) -> tuple[tuple[TokenSequence, ...], int, tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences: list[TokenSequence] = []
    for text, pair in TEXTS:
        encoding = tokenizer(text, pair)
        types = encoding.get("token_type_ids")
        sequences.append(TokenSequence(tuple(encoding["input_ids"]), None if types is None else tuple(types)))
    special = set(tokenizer.all_special_ids)
    long = [set(sequence.input_ids) - special for sequence in sequences[1:]]
    return tuple(sequences), len(tokenizer), tuple(sorted((long[0] & long[1]) | (long[1] & long[2])))
