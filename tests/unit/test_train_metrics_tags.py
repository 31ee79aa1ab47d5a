"""Entity scores against seqeval's default mode, and the schemes that it does not know against those it does."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import accuracy_score
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

from lora_runtime.answers.tags import entity_spans, parse_tag
from lora_runtime.train.metrics.classes import LabelScore
from lora_runtime.train.metrics.tags import entity_scores, score_tags

LABELS = ("O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("LOC", "PER")))
SENTENCE = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=12)


def spans(tags: list[str], labels: tuple[str, ...] = LABELS) -> list[tuple[str, int, int]]:
    return [(kind, first, end - 1) for kind, first, end in entity_spans(tags, labels)]


@given(st.lists(st.sampled_from(LABELS), max_size=16))
def test_entities_are_those_of_seqeval(tags: list[str]) -> None:
    assert spans(tags) == get_entities(tags)


@given(st.lists(st.sampled_from(LABELS), max_size=16))
def test_bilou_spells_the_same_entities_as_bioes(tags: list[str]) -> None:
    renamed = str.maketrans("ES", "LU")
    bilou, labels = ([tag[0].translate(renamed) + tag[1:] for tag in some] for some in (tags, LABELS))
    assert spans(bilou, tuple(labels)) == get_entities(tags)


@given(st.lists(st.sampled_from(["O", "E-mail", "PER"]), max_size=16))
def test_plain_names_make_an_entity_of_neighbours(tags: list[str]) -> None:
    as_inside = [tag if tag == "O" else f"I-{tag}" for tag in tags]
    assert spans(tags, ("O", "E-mail", "PER")) == get_entities(as_inside)


@pytest.mark.parametrize(
    ("label", "labels", "kind"),
    [("B-A-B", (), "A-B"), ("U-X", ("I-X",), "X"), ("E-mail", ("O", "B-X"), "E-mail"), ("O", (), "O"), ("B", (), "B")],
)
def test_the_kind_of_a_label(label: str, labels: tuple[str, ...], kind: str) -> None:
    assert parse_tag(label, labels).kind == kind


@given(st.lists(SENTENCE, min_size=1, max_size=5))
def test_scores_are_those_of_seqeval(sentences: list[list[tuple[str, str]]]) -> None:
    predicted = [[mine for mine, _ in sentence] for sentence in sentences]
    truth = [[theirs for _, theirs in sentence] for sentence in sentences]
    with warnings.catch_warnings():  # seqeval and numpy warn of entities that never occur
        warnings.simplefilter("ignore")
        micro = precision_recall_fscore_support(truth, predicted, average="micro", zero_division=0)
        each = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
    found = score_tags(predicted, truth, LABELS)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx([float(x) for x in micro[:3]])
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    table = entity_scores(predicted, truth, LABELS)
    for place, name in enumerate(("precision", "recall", "f1", "support")):
        assert [getattr(score, name) for score in table] == pytest.approx([float(x) for x in each[place]])


def test_an_entity_with_one_wrong_end_is_wrong() -> None:
    truth, predicted = [["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]]
    assert score_tags(predicted, truth, LABELS) == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.75}
    assert entity_scores(predicted, truth, LABELS) == (
        LabelScore("LOC", 1.0, 1.0, 1.0, 1),
        LabelScore("PER", 0.0, 0.0, 0.0, 1),
    )
