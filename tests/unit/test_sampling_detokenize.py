"""Text in pieces joins to what the tokenizer decodes, and no piece has half a character."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_runtime.sampling.detokenize import Detokenizer, TokenText

CORPUS = [
    "hello world, hello there",
    "the cat  sat",
    "日本語のテキスト 日本",
    "naïve café e\u0301",
    "👍🏽 ok 👨‍👩‍👧",
] * 3
ADDED = ["<eos>", "<pad>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=ADDED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("ñ", special=False)])
    return tokenizer


def metaspace_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[*ADDED, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 has it: SentencePiece BPE whose unknown characters become tokens of one byte."""
    pieces = ["<unk>", *ADDED, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghilnorstw,", "▁h", "▁he"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab, [("▁", "h"), ("▁h", "e")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(ADDED)
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "unigram": metaspace_unigram(), "byte fallback": byte_fallback()}
TEXTS = [
    "hello world", " hello", "  two  spaces ", "日本語 mixed with hello", "👍🏽👨‍👩‍👧 done", "e\u0301 café naïve",
    "hi\n\nthere\t", "𝒳𝒴 ẞ \u200d", "", " ", "\u2028𐍈",
]  # fmt: skip


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    text = TokenText(Detokenizer(tokenizer))
    return [*(text.append(token) for token in ids), text.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.sampled_from("ab hé日👍\u0301𐍈\n "), max_size=30), seed=st.integers(0, 99))
def test_special_tokens_in_the_middle_show_nothing(name: str, text: str, seed: int) -> None:
    tokenizer = TOKENIZERS[name]
    rng = random.Random(seed)
    ids: list[int] = []
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        ids += [tokenizer.token_to_id("<eos>")] * (rng.random() < 0.3) + [token]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 361), max_size=40))
def test_any_tokens_of_a_byte_level_tokenizer_give_the_decoded_text(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@pytest.mark.parametrize("num_missing", [1, 2, 3])
def test_a_character_cut_at_the_end_comes_out_as_the_decoder_has_it(name: str, num_missing: int) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("ha 𐍈", add_special_tokens=False).ids[:-num_missing]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert pieces[-1].startswith("\ufffd") and not any("\ufffd" in piece for piece in pieces[:-1])


def test_an_added_token_is_text() -> None:
    tokenizer = TOKENIZERS["byte level"]
    token = tokenizer.token_to_id("<tool call>")
    assert pieces_of(tokenizer, [token]) == ["<tool call>", ""]


def test_a_character_is_sent_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("日本", add_special_tokens=False).ids
    assert [piece for piece in pieces_of(tokenizer, ids) if piece] == ["日", "本"]


def test_work_per_token_does_not_grow_with_bytes_that_are_no_text() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    detokenizer = Detokenizer(tokenizer)
    longest = 0
    whole = detokenizer.decode

    def watched(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return whole(ids)

    detokenizer.decode = watched  # type: ignore[method-assign]
    text = TokenText(detokenizer)
    bad = tokenizer.token_to_id("<0xFF>")
    sent = "".join(text.append(bad) for _ in range(400)) + text.flush()
    assert sent == tokenizer.decode([bad] * 400) and longest <= 16
