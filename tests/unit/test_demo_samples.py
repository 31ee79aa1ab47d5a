"""The packaged samples: small, balanced, without leaks, and readable by the trainer."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from lora_runtime.train.rows.classify import ClassifySchema, read_classify_rows
from server.demo.samples import RECIPES, SAMPLE_NAMES, load_sample

NUM_LABELS = {"sms_spam": 2, "snips": 7, "banking77": 12}


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_a_sample_is_small_balanced_and_keeps_test_rows_apart(name: str) -> None:
    sample = load_sample(name)
    assert len(sample.labels) == NUM_LABELS[name]
    assert len(sample.train) + len(sample.test) <= 300
    for rows in (sample.train, sample.test):
        counts = Counter(row.label for row in rows)
        assert set(counts) == set(sample.labels)
        assert len(set(counts.values())) == 1
    texts = [row.text.casefold() for row in (*sample.train, *sample.test)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", SAMPLE_NAMES)
def test_the_trainer_reads_what_a_sample_writes(name: str, tmp_path: Path) -> None:
    sample = load_sample(name)
    rows = read_classify_rows(sample.write_train_csv(tmp_path), ClassifySchema())
    assert [(row.text, row.labels[0]) for row in rows] == [(row.text, row.label) for row in sample.train]


def test_every_sample_is_attributed_with_its_licence() -> None:
    text = (resources.files("server.demo") / "data" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"## {name}" in text
        assert f"`{name}.csv`" in text
    assert text.count("Licence: ") == len(RECIPES)


def test_an_unknown_sample_is_refused_with_the_known_names() -> None:
    with pytest.raises(KeyError, match="sms_spam, snips, banking77"):
        load_sample("imdb")
