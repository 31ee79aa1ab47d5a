"""How metrics are called and written for people, and which of them share an axis."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Unit(StrEnum):
    """What a metric counts; also the label of its axis."""

    SHARE = "share, 0 to 1"
    POINTS = "points, 0 to 100"
    CORRELATION = "correlation, −1 to 1"
    ERROR = "error, in units of the label (mse: squared)"
    PERPLEXITY = "perplexity"
    OTHER = "value"


@dataclass(frozen=True, slots=True)
class Metric:
    """`form` is the format specification of a value; a percent sign multiplies it by a hundred."""

    title: str
    unit: Unit
    form: str = ".3f"


METRICS = {
    "accuracy": Metric("accuracy", Unit.SHARE, "%"),
    "macro_f1": Metric("macro-F1", Unit.SHARE),
    "f1": Metric("F1", Unit.SHARE),
    "precision": Metric("precision", Unit.SHARE),
    "recall": Metric("recall", Unit.SHARE),
    "exact_match": Metric("exact match", Unit.SHARE, "%"),
    "answerable_exact_match": Metric("exact match (answerable)", Unit.SHARE, "%"),
    "answerable_f1": Metric("F1 (answerable)", Unit.SHARE),
    "unanswerable_accuracy": Metric("accuracy (unanswerable)", Unit.SHARE, "%"),
    "retrieval_accuracy": Metric("retrieval accuracy", Unit.SHARE, "%"),
    "triplet_accuracy": Metric("triplet accuracy", Unit.SHARE, "%"),
    "bleu": Metric("BLEU", Unit.POINTS, ".1f"),
    "chrf": Metric("chrF", Unit.POINTS, ".1f"),
    "perplexity": Metric("perplexity", Unit.PERPLEXITY, ".4g"),
    "pearson": Metric("pearson", Unit.CORRELATION),
    "spearman": Metric("spearman", Unit.CORRELATION),
    "mse": Metric("mse", Unit.ERROR, ".4g"),
    "mae": Metric("mae", Unit.ERROR, ".4g"),
    "loss": Metric("loss", Unit.OTHER, ".4f"),
}


def metric_of(name: str) -> Metric:
    """A metric's entry; one that is not known keeps its name."""
    return METRICS.get(name) or Metric(name.replace("_", " "), Unit.OTHER)


def shown_value(name: str, value: float) -> str:
    """`93.8 %` of an accuracy, `0.937` of an F1, `27.4` of a BLEU."""
    form = metric_of(name).form
    return f"{100 * value:.1f} %" if form == "%" else f"{value:{form}}"
