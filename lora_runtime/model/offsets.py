"""Where tokens and words lie in a text, in code points, whatever the tokenizer's own account of it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

Range = tuple[int, int]  # first code point, one past the last

# Each alternative takes a run whole or not at all, so that no text makes the search quadratic.
_BETWEEN = regex.compile(r"\s++|\p{Han}++|(?<!\S)\p{P}++|(?<!\p{P})\p{P}++(?!\S)")


def tidy_ranges(text: str, ranges: Sequence[Range]) -> list[Range]:
    """Tokens' ranges without white space at either end, and with the combining marks that the tokenizer dropped.

    Byte-level tokens begin with the space before a word, so an answer that starts there would too; a token of nothing
    but white space becomes an empty range after it. An uncased BERT drops the accent of "e" + U+0301, which belongs
    to the character before it unless a token of its own covers it.
    """
    tidy: list[Range] = []
    for k, (start, end) in enumerate(ranges):
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        following = ranges[k + 1][0] if k + 1 < len(ranges) else len(text)
        while start < end < following and unicodedata.category(text[end]).startswith("M"):
            end += 1
        tidy.append((start, end))
    return tidy


def number_words(text: str, ranges: Sequence[Range], word_ids: Sequence[int | None]) -> list[int]:
    """Each token's word, counted from 0: the tokenizer's words, cut at the edges that a BERT would see.

    Tokenizers that split no text beforehand (Llama's) call a whole text one word; those that split at spaces (XLM-R's)
    a whole Chinese sentence, and a word with the full stop after it. A space that is a token of its own belongs to the
    word after it, since that is where labels of words are trained.
    """
    edges = _edges(text)
    numbers: list[int] = []
    number, previous, begin, end = -1, None, 0, 0  # begin, end: of the word so far
    for (start, stop), word in zip(ranges, word_ids, strict=True):
        if begin == end:
            over = start != begin or (begin > 0 and text[begin - 1] != " ")
        else:  # a token that starts before `end` is in the same character as the one before it
            over = any(edge in edges for edge in range(end, start + 1))
        if over or word is None or word != previous:
            number, previous, begin, end = number + 1, word, start, start
        end = max(end, stop)
        numbers.append(number)
    return numbers


def _edges(text: str) -> set[int]:
    """Where one word ends or the next begins: at white space, Chinese characters, punctuation around a word."""
    edges: set[int] = set()
    for match in _BETWEEN.finditer(text):
        edges.update(range(match.start(), match.end() + 1))
    return edges
