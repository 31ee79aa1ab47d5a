"""CoNLL files: a word a line with its tag in the last column, sentences apart by blank lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lora_runtime.errors import TrainingDataInvalid
from lora_runtime.train.rows.place import Place

ENDINGS = (".conll", ".bio", ".iob", ".txt")
_SPACES = re.compile("[ \t]+")
_DOCUMENT = "-DOCSTART-"


def read_conll(path: Path, text: str) -> Iterator[tuple[Place, list[str], list[str]]]:
    """Place, words and tags of every sentence; `-DOCSTART-` lines are passed over.

    Columns are parted by tabs where a line has one, else by spaces. The first is the word, the last the tag.
    """
    words: list[str] = []
    tags: list[str] = []
    first, num_columns = 0, 0
    for line, source in enumerate(text.split("\n"), start=1):
        columns = _columns(source)
        if not columns or columns[0] == _DOCUMENT:
            if words:
                yield Place(path, first), words, tags
                words, tags = [], []
            continue
        num_columns = num_columns or len(columns)
        _check(path, line, columns, num_columns)
        if not words:
            first = line
        words.append(columns[0])
        tags.append(columns[-1])
    if words:
        yield Place(path, first), words, tags


def _columns(source: str) -> list[str]:
    source = source.removesuffix("\r")
    if not source.strip():
        return []
    return source.split("\t") if "\t" in source else _SPACES.split(source.strip(" "))


def _check(path: Path, line: int, columns: list[str], num_columns: int) -> None:
    if len(columns) < 2:
        raise TrainingDataInvalid(path, line, "has one column; a line is a word and its tag, parted by a tab or spaces")
    if len(columns) != num_columns:
        remedy = "part them by tabs if words hold spaces"
        message = f"has {len(columns)} columns, the lines before have {num_columns}; {remedy}"
        raise TrainingDataInvalid(path, line, message)
    if not columns[0].strip():
        raise TrainingDataInvalid(path, line, "the word is empty; the first column is the word")
    if not columns[-1].strip():
        raise TrainingDataInvalid(path, line, "the tag is empty; write O for a word outside every entity")
