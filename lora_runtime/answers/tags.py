"""Tags of words and the entities that they spell, in BIO, IOB2, BIOES, BILOU, or by plain names. No numpy, no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

OUTSIDE = "O"
_STARTS = frozenset("BSU")  # begin a new entity whatever came before
_ENDS = frozenset("ESLU")  # close theirs; E and L stand for one thing in two schemes, as do S and U


class Tag(NamedTuple):
    """A label taken apart: `B-PER` is B and PER; a label of no scheme has an empty prefix."""

    prefix: str
    kind: str


class EntitySpan(NamedTuple):
    """Words `first` up to, not including, `end` are one entity."""

    kind: str
    first: int
    end: int


def parse_tag(label: str, labels: Collection[str]) -> Tag:
    """`labels` are all that there are: `S-`, `E-` and the like count only beside a B- or I- of their kind.

    So `E-mail` alone is a label of no scheme.
    """
    prefix, dash, kind = label.partition("-")
    if dash and kind and len(prefix) == 1:
        own = prefix in "BI"
        if own or (prefix in "ESLU" and (f"B-{kind}" in labels or f"I-{kind}" in labels)):
            return Tag(prefix, kind)
    return Tag("", label)


def entity_spans(words: Sequence[str], labels: Collection[str]) -> Iterator[EntitySpan]:
    """The entities of a text whose words have these labels, in order; as seqeval's default mode finds them.

    An entity goes on while the kind stays the same, up to a label that starts another or ends its own.
    """
    tags = {label: parse_tag(label, labels) for label in set(words)}
    kind: str | None = None  # of the entity that the next word may continue
    first = 0
    for index, label in enumerate(words):
        tag = tags[label]
        goes_on = label != OUTSIDE and tag.kind == kind and tag.prefix not in _STARTS
        if kind is not None and not goes_on:
            yield EntitySpan(kind, first, index)
            kind = None
        if label == OUTSIDE:
            continue
        if not goes_on:
            kind, first = tag.kind, index
        if tag.prefix in _ENDS:
            yield EntitySpan(tag.kind, first, index + 1)
            kind = None
    if kind is not None:
        yield EntitySpan(kind, first, len(words))
