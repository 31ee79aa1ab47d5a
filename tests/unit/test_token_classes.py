"""Labels of tokens, words and entities, each with its place in the text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from lora_runtime.answers.token_classes import SubwordStrategy, TokenUnit, label_tokens
from lora_runtime.model.encoder_text import TokenText
from lora_runtime.types import TokenClassification, TokenSequence
from tests.text_encoders import make_encoder

BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def words_text(*words: str) -> tuple[str, TokenText]:
    """A text of one token per word between two special tokens."""
    text = " ".join(words)
    places: list[tuple[int, int]] = []
    for word in words:
        start = places[-1][1] + 1 if places else 0
        places.append((start, start + len(word)))
    sequence = TokenSequence(tuple(range(len(words) + 2)), None)
    return text, TokenText(sequence, (None, *places, None), (None, *range(len(words)), None))


def logits_for(names: Sequence[str | None], labels: Sequence[str], margin: float = 5.0) -> TokenClassification:
    """Each token's own label ahead by `margin`; None is a special token, which says something loud and wrong."""
    rows = [
        tuple(float(k) * 100 for k in range(len(labels)))
        if name is None
        else tuple(margin if label == name else 0.0 for label in labels)
        for name in names
    ]
    return TokenClassification(tuple(rows))


def entities(tags: str, labels: Sequence[str], words: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(characters, label) of each entity when the words are labelled with `tags`."""
    names = tags.split()
    text, tokenised = words_text(*(words or [f"w{k}" for k in range(len(names))]))
    output = logits_for([None, *names, None], labels)
    found = label_tokens(tokenised, output, labels, unit=TokenUnit.ENTITIES, strategy=SubwordStrategy.FIRST)
    return [(text[entity.start : entity.end], entity.label) for entity in found]


def test_every_token_but_the_special_ones_gets_a_label() -> None:
    _, tokenised = words_text("Leo", "wrote")
    output = logits_for([None, "B-PER", "O", None], BIO, margin=math.log(6))
    found = label_tokens(tokenised, output, BIO, unit=TokenUnit.TOKENS, strategy=SubwordStrategy.FIRST)
    assert [(label.start, label.end, label.label) for label in found] == [(0, 3, "B-PER"), (4, 9, "O")]
    assert found[0].scores == pytest.approx((0.1, 0.6, 0.1, 0.1, 0.1))
    assert found[0].score == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("w0 w1", "PER"), ("w3", "LOC")]),
        ("B-PER B-PER", [("w0", "PER"), ("w1", "PER")]),
        ("I-PER I-PER O I-LOC", [("w0 w1", "PER"), ("w3", "LOC")]),  # IOB1
        ("B-PER I-LOC I-LOC", [("w0", "PER"), ("w1 w2", "LOC")]),
        ("B-PER O I-PER", [("w0", "PER"), ("w2", "PER")]),
        ("O O", []),
    ],
)
def test_bio_labels_become_entities(tags: str, expected: list[tuple[str, str]]) -> None:
    assert entities(tags, BIO) == expected


@pytest.mark.parametrize("last", ["E", "L"])
@pytest.mark.parametrize("single", ["S", "U"])
def test_bioes_and_bilou_labels_become_entities(last: str, single: str) -> None:
    labels = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in ("B", "I", last, single))]
    tags = f"B-PER I-PER {last}-PER I-PER {single}-PER {single}-PER O B-LOC {last}-LOC {last}-PER I-PER"
    assert entities(tags, labels) == [
        ("w0 w1 w2", "PER"), ("w3", "PER"), ("w4", "PER"), ("w5", "PER"), ("w7 w8", "LOC"), ("w9", "PER"),
        ("w10", "PER"),
    ]  # fmt: skip


def test_labels_without_a_scheme_join_equal_neighbours() -> None:
    labels = ("O", "E-mail", "Phone", "o")
    tags = "E-mail E-mail Phone O Phone o"
    assert entities(tags, labels) == [("w0 w1", "E-mail"), ("w2", "Phone"), ("w4", "Phone"), ("w5", "o")]


def test_a_type_may_have_a_dash_of_its_own() -> None:
    assert entities("B-X-RAY I-X-RAY", ("O", "B-X-RAY", "I-X-RAY")) == [("w0 w1", "X-RAY")]


def test_an_entitys_scores_are_the_means_over_its_words() -> None:
    _, tokenised = words_text("Leo", "Tolstoy")
    output = TokenClassification(((9.0, 0.0, 0.0), (0.0, math.log(2), 0.0), (0.0, 0.0, math.log(6)), (9.0, 0.0, 0.0)))
    (entity,) = label_tokens(
        tokenised, output, ("O", "B-PER", "I-PER"), unit=TokenUnit.ENTITIES, strategy=SubwordStrategy.FIRST
    )
    assert (entity.start, entity.end, entity.label) == (0, 11, "PER")
    assert entity.score == pytest.approx((0.5 + 0.75) / 2)
    assert entity.scores == pytest.approx((0.1875, 0.3125, 0.5))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (SubwordStrategy.FIRST, (0.6, 0.4)),
        (SubwordStrategy.AVERAGE, (1.4 / 3, 1.6 / 3)),
        (SubwordStrategy.MAX, (0.1, 0.9)),
    ],
)
def test_a_words_scores_come_from_its_tokens(strategy: SubwordStrategy, expected: tuple[float, ...]) -> None:
    rows = [(0.6, 0.4), (0.1, 0.9), (0.7, 0.3)]
    output = TokenClassification(tuple((math.log(a), math.log(b)) for a, b in rows))
    tokenised = TokenText(TokenSequence((1, 2, 3), None), ((0, 4), (4, 6), (6, 9)), (0, 0, 0))
    (word,) = label_tokens(tokenised, output, ("no", "yes"), unit=TokenUnit.WORDS, strategy=strategy)
    assert (word.start, word.end) == (0, 9)
    assert word.scores == pytest.approx(expected)
    assert word.label == ("yes" if expected[1] > expected[0] else "no")


def test_equal_scores_give_the_first_label() -> None:
    _, tokenised = words_text("Leo")
    output = TokenClassification(((0.0, 0.0),) * 3)
    (word,) = label_tokens(tokenised, output, ("a", "b"), unit=TokenUnit.WORDS, strategy=SubwordStrategy.FIRST)
    assert (word.label, word.score) == ("a", 0.5)


def mark(family: str, text: str, wanted: Sequence[str], unit: TokenUnit) -> list[tuple[str, str]]:
    """Tokenise, label with "B-PER" and "I-PER" the tokens of each string of `wanted`, and read the labels back."""
    (tokenised,) = make_encoder(family).encode_tokens([text], max_length=None, truncate=False)
    names = [None if place is None else name_of(*place, text, wanted) for place in tokenised.offsets]
    found = label_tokens(tokenised, logits_for(names, BIO), BIO, unit=unit, strategy=SubwordStrategy.FIRST)
    return [(text[label.start : label.end], label.label) for label in found]


def name_of(start: int, end: int, text: str, wanted: Sequence[str]) -> str:
    """An empty token, the space before a word, is labelled as the word."""
    for part in wanted:
        first = text.index(part)
        if start < first + len(part) and max(end, start + 1) > first:
            return "B-PER" if start <= first else "I-PER"
    return "O"


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_entities_of_real_tokenizers_are_the_characters_themselves(family: str) -> None:
    text = "Yesterday  Zoë\r\nde la Cruz-Ångström met 王小明 and 😀👍🏽!"
    wanted = ["Zoë\r\nde la Cruz-Ångström", "王小明", "😀👍🏽"]
    assert mark(family, text, wanted, TokenUnit.ENTITIES) == [(part, "PER") for part in wanted]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_words_of_white_space_get_no_label(family: str) -> None:
    assert mark(family, "Leo \r\n\r\n   Tolstoy ", ["Leo"], TokenUnit.WORDS) == [("Leo", "B-PER"), ("Tolstoy", "O")]


def test_a_text_without_tokens_has_no_labels() -> None:
    (tokenised,) = make_encoder("bert").encode_tokens([""], max_length=None, truncate=False)
    output = logits_for([None, None], BIO)
    for unit in TokenUnit:
        assert label_tokens(tokenised, output, BIO, unit=unit, strategy=SubwordStrategy.MAX) == ()
