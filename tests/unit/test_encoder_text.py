"""Tokenising with places: offsets a person would mark, words, and windows of a long context."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.model.encoder_text import MIN_CONTEXT_TOKENS, TextEncoder, TokenText, Window
from tests.text_encoders import FAMILIES, make_encoder, make_tokenizer

QUESTION = "Who wrote the book?"
CONTEXT = 6 * (
    "Anna Karenina was written by Leo Tolstoy.\r\nIt came out in 1877 — "
    "😀 cafe\u0301, zero\u200bwidth  北京是中国的首都. "
)


def words_of(tokenised: TokenText, text: str) -> list[str]:
    """The characters of each word, words of white space left out."""
    spans: dict[int, tuple[int, int]] = {}
    for word, place in zip(tokenised.word_ids, tokenised.offsets, strict=True):
        if word is not None and place is not None and place[0] < place[1]:
            start, end = spans.get(word, place)
            spans[word] = min(start, place[0]), max(end, place[1])
    return [text[start:end] for start, end in spans.values()]


def windows_of(encoder: TextEncoder, **limits: int) -> tuple[Window, ...]:
    (windows,) = encoder.encode_questions([(QUESTION, CONTEXT)], **{"max_length": None, **limits})
    return windows


def refusal(encoder: TextEncoder, question: str, context: str, **limits: int) -> InvalidRequest:
    pairs = [(QUESTION, "Leo Tolstoy."), (question, context)]
    with pytest.raises(InvalidRequest) as caught:
        encoder.encode_questions(pairs, **{"max_length": None, **limits})
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("limit", "stride"), [(48, 5), (64, 0), (96, 20)])
def test_windows_are_those_of_the_tokenizers_own_truncation(family: str, limit: int, stride: int) -> None:
    windows = windows_of(make_encoder(family), max_length=limit, doc_stride=stride)
    expected = make_tokenizer(family)(
        QUESTION, CONTEXT, truncation="only_second", max_length=limit, stride=stride, return_overflowing_tokens=True
    )
    assert len(windows) > 2
    assert [list(window.sequence.input_ids) for window in windows] == expected["input_ids"]
    if "token_type_ids" in make_tokenizer(family).model_input_names:
        types = [window.sequence.token_type_ids for window in windows]
        assert [list(row or ()) for row in types] == expected["token_type_ids"]
    else:
        assert all(window.sequence.token_type_ids is None for window in windows)
    for k, window in enumerate(windows):
        is_context = [part == 1 for part in expected.sequence_ids(k)]
        assert [place is not None for place in window.offsets] == is_context


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sides_on_which_a_tokenizer_pads_and_truncates_do_not_matter(family: str) -> None:
    left = make_encoder(family, padding_side="left", truncation_side="left")
    assert windows_of(left, max_length=64) == windows_of(make_encoder(family), max_length=64)


@pytest.mark.parametrize(
    ("family", "expected"), [("bert", 0), ("roberta", 0), ("llama", 0), ("gpt2", None), ("xlnet", -1)]
)
def test_no_answer_is_scored_at_cls_else_at_bos(family: str, expected: int | None) -> None:
    for window in windows_of(make_encoder(family), max_length=64):
        last = window.sequence.num_tokens - 1
        assert window.null_index == (last if expected == -1 else expected)
        assert window.null_index is None or window.offsets[window.null_index] is None


def test_a_special_token_that_the_text_spells_is_not_where_no_answer_is_scored() -> None:
    ((window,),) = make_encoder("gpt2").encode_questions([("<s> who?", "Leo <s>")], max_length=None)
    assert window.null_index is None


def test_windows_overlap_by_a_quarter_of_their_room_unless_told_otherwise() -> None:
    encoder = make_encoder("bert")
    for stride, shared in ((None, (64 - 8) // 4), (3, 3), (1000, (64 - 8) // 2)):
        first, second, *_ = windows_of(encoder, max_length=64, **({} if stride is None else {"doc_stride": stride}))
        places = [[place for place in window.offsets if place is not None] for window in (first, second)]
        assert places[0][-shared:] == places[1][:shared]
        assert places[0][-shared - 1] < places[1][0]


def test_a_context_that_fits_is_one_window_however_little_room_there_is() -> None:
    encoder = make_encoder("bert", max_length=10)
    ((window,),) = encoder.encode_questions([(QUESTION, "Leo")], max_length=None)
    assert window.sequence == encoder.encode([(QUESTION, "Leo")], max_length=None, truncate=False)[0]


def test_a_question_that_leaves_no_sensible_room_is_refused() -> None:
    error = refusal(make_encoder("bert"), "why " * 40 + "?", CONTEXT, max_length=44 + MIN_CONTEXT_TOKENS - 1)
    assert error.field == "inputs[1].question"
    assert "41 tokens" in error.description
    assert f"{MIN_CONTEXT_TOKENS - 1} of its context" in error.description
    assert windows_of(make_encoder("bert"), max_length=8 + MIN_CONTEXT_TOKENS, max_windows=1000)


def test_a_context_of_too_many_windows_is_refused() -> None:
    encoder = make_encoder("bert")
    number = len(windows_of(encoder, max_length=32))
    assert len(windows_of(encoder, max_length=32, max_windows=number)) == number
    error = refusal(encoder, QUESTION, CONTEXT, max_length=32, max_windows=number - 1)
    assert error.field == "inputs[1].context"
    assert f"needs {number} windows of 24 tokens, the limit is {number - 1}" in error.description


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", ["", " \r\n\t"])
def test_a_question_without_text_and_a_context_without_text_are_refused(family: str, empty: str) -> None:
    encoder = make_encoder(family)
    assert refusal(encoder, empty, CONTEXT).field == "inputs[1].question"
    assert refusal(encoder, QUESTION, empty).field == "inputs[1].context"


def test_a_text_of_which_the_tokenizer_keeps_nothing_is_refused() -> None:
    assert refusal(make_encoder("bert"), QUESTION, "\u200b\u200b").field == "inputs[1].context"


def test_a_negative_overlap_is_refused() -> None:
    assert refusal(make_encoder("bert"), QUESTION, CONTEXT, doc_stride=-1).field == "doc_stride"


def test_a_lone_surrogate_is_refused_by_place_and_without_the_text() -> None:
    encoder = make_encoder("bert")
    assert refusal(encoder, QUESTION, "secret\ud800").field == "inputs[1].context"
    for call in (
        lambda: encoder.encode([("secret\ud800", None)], max_length=None, truncate=True),
        lambda: encoder.encode_tokens(["secret\ud800"], max_length=None, truncate=True),
    ):
        with pytest.raises(InvalidRequest, match="at character 6") as caught:
            call()
        assert caught.value.field == "inputs[0].text"
        assert "secret" not in caught.value.message
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        encoder.encode([("fine", "\udfff")], max_length=None, truncate=True)
    assert caught.value.field == "inputs[0].text_pair"


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_hold_words_and_no_space_around_them(family: str) -> None:
    text = "Leo Tolstoy,\r\nAnna  Karenina\t1877"
    (tokenised,) = make_encoder(family).encode_tokens([text], max_length=None, truncate=False)
    assert "".join(words_of(tokenised, text)) == "LeoTolstoy,AnnaKarenina1877"
    for place in tokenised.offsets:
        assert place is None or text[slice(*place)].strip() == text[slice(*place)]


@pytest.mark.parametrize("family", ["roberta", "gpt2", "llama"])
def test_tokens_inside_one_character_all_have_its_place(family: str) -> None:
    text = "a 😀 b"
    (tokenised,) = make_encoder(family).encode_tokens([text], max_length=None, truncate=False)
    assert [text[slice(*place)] for place in tokenised.offsets if place].count("😀") == 4
    assert words_of(tokenised, text) == ["a", "😀", "b"]


def test_marks_that_a_tokenizer_drops_stay_with_their_character() -> None:
    text = "cafe\u0301 ❤\ufe0f, हिन्दी"
    (tokenised,) = make_encoder("bert").encode_tokens([text], max_length=None, truncate=False)
    assert words_of(tokenised, text) == ["cafe\u0301", "❤\ufe0f", ",", "हिन्दी"]


def test_characters_that_a_tokenizer_drops_do_not_shift_what_follows() -> None:
    text = "\ufeffzero\u200bwidth\x00 \U0001f468\u200d\U0001f469 Leo\r\n\r\nTolstoy"
    (tokenised,) = make_encoder("bert").encode_tokens([text], max_length=None, truncate=False)
    words = words_of(tokenised, text)
    assert words[-2:] == ["Leo", "Tolstoy"]
    assert words[0].endswith("width")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chinese_sentence_is_not_one_word(family: str) -> None:
    text = "Leo 是中国的 Anna"
    (tokenised,) = make_encoder(family).encode_tokens([text], max_length=None, truncate=False)
    assert words_of(tokenised, text) == ["Leo", "是", "中", "国", "的", "Anna"]


@pytest.mark.parametrize("family", FAMILIES)
def test_punctuation_around_a_word_is_not_part_of_it(family: str) -> None:
    text = "(Leo Tolstoy), written in 1905."
    (tokenised,) = make_encoder(family).encode_tokens([text], max_length=None, truncate=False)
    words = words_of(tokenised, text)
    assert [word for word in words if word.isalnum()] == ["Leo", "Tolstoy", "written", "in", "1905"]


def test_a_word_of_a_tokenizer_without_words_keeps_the_punctuation_inside_it() -> None:
    text = "Jean-Pierre O'Neill's"
    (tokenised,) = make_encoder("llama").encode_tokens([text], max_length=None, truncate=False)
    assert words_of(tokenised, text) == ["Jean-Pierre", "O'Neill's"]


@pytest.mark.parametrize("character", ["!", " ", "国", "a!", "\u0301"])
def test_long_runs_of_one_character_take_no_more_than_their_length(character: str) -> None:
    text = character * 20_000
    begun = time.perf_counter()
    make_encoder("gpt2", max_length=1_000_000).encode_tokens([text], max_length=None, truncate=False)
    assert time.perf_counter() - begun < 10  # a tenth of a second, where a square would take minutes


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_have_no_place_and_no_word(family: str) -> None:
    encoder = make_encoder(family)
    (tokenised,) = encoder.encode_tokens(["Leo Tolstoy"], max_length=None, truncate=False)
    expected = make_tokenizer(family)("Leo Tolstoy").sequence_ids(0)
    assert [place is None for place in tokenised.offsets] == [part is None for part in expected]
    assert [word is None for word in tokenised.word_ids] == [part is None for part in expected]
    assert tokenised.sequence == encoder.encode([("Leo Tolstoy", None)], max_length=None, truncate=False)[0]


def test_a_text_without_characters_has_special_tokens_alone() -> None:
    (tokenised,) = make_encoder("bert").encode_tokens([""], max_length=None, truncate=False)
    assert tokenised.offsets == tokenised.word_ids == (None, None)


def test_a_text_for_tokens_that_is_too_long_is_refused_or_cut() -> None:
    encoder = make_encoder("bert")
    with pytest.raises(TextTooLong) as caught:
        encoder.encode_tokens(["Leo", "one two three"], max_length=4, truncate=False)
    assert caught.value.field == "inputs[1].text"
    short, cut = encoder.encode_tokens(["Leo", "one two three"], max_length=4, truncate=True)
    assert not short.sequence.truncated
    assert cut.sequence.truncated
    assert cut.offsets == (None, (0, 3), (4, 7), None)
    with pytest.raises(InvalidRequest, match="special tokens alone"):
        encoder.encode_tokens(["one two"], max_length=1, truncate=True)


def test_threads_do_not_see_each_others_truncation() -> None:
    encoder = make_encoder("bert")

    def work(k: int) -> object:
        if k % 3 == 0:
            return windows_of(encoder, max_length=40)
        if k % 3 == 1:
            return encoder.encode([(CONTEXT, None)], max_length=10 + k % 5, truncate=True)
        return encoder.encode_tokens([CONTEXT], max_length=None, truncate=False)

    alone = [work(k) for k in range(15)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(60))) == alone * 4
