"""The cases: which rows, which base, which commands, and what is asked of the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.recipes.commands import Step
from tests.recipes.rows import Part


@dataclass(frozen=True)
class Test:
    """A split that nobody trained on, and what is asked of the figures there."""

    __test__ = False  # not pytest's

    split: str  # under the data folder
    count: int | None = None  # the first rows of it; None: all
    at_least: tuple[tuple[str, float], ...] = ()
    margin: tuple[tuple[str, float], ...] = ()  # over the untuned base


@dataclass(frozen=True)
class Case:
    """One adapter, from its rows to its figures on test splits."""

    name: str  # the adapter's, on the server
    kind: str  # classify, answer or translate
    base: str  # one of `bases.BASES`
    parts: tuple[Part, ...]  # files made before the commands
    steps: tuple[Step, ...]  # each makes an adapter, which is measured; the last one's is what the case is about
    tests: tuple[Test, ...]


def _step(task: str, out: str, train: str, valid: str, *extra: str, **options: Any) -> Step:
    words = ["train", task, "--base", "{base}", "--train", train, "--valid", valid]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return Step((*words, *extra, "--out", f"{{work}}/{out}"), out)


_AG_NEWS = Part("ag_news/train.csv", 4000)
NEWS = Case(
    "news",
    "classify",
    "minilm",
    (_AG_NEWS,),
    (
        _step(
            "classify", "news", f"{{work}}/{_AG_NEWS.file}", "{data}/ag_news/valid.csv",
            epochs=1, batch_size=16, max_length=64, learning_rate=1e-3, threads=2,
        ),
    ),
    (Test("ag_news/test.csv", at_least=(("accuracy", 0.86),)),),
)  # fmt: skip

NEWS_GPT2 = Case(
    "news-gpt2",
    "classify",
    "gpt2",
    (),
    (
        _step(
            "classify", "news-gpt2", "{data}/ag_news/train.csv", "{data}/ag_news/valid.csv",
            epochs=1, batch_size=16, max_length=32, learning_rate=3e-3, threads=1,
        ),
    ),
    (Test("ag_news/test.csv", at_least=(("accuracy", 0.8),)),),
)  # fmt: skip

_SQUAD = Part("squad1/train.json", 1000)
READER = Case(
    "reader",
    "answer",
    "minilm",
    (_SQUAD,),
    (
        _step(
            "answer", "reader-wikipedia", f"{{work}}/{_SQUAD.file}", "{data}/squad1/valid.json",
            epochs=1, batch_size=12, max_length=192, learning_rate=1.5e-3, threads=1,
        ),
        _step(
            "answer", "reader-medical", "{data}/bioasq_factoid/train.json", "{data}/bioasq_factoid/valid.json",
            "--start-from", "{work}/reader-wikipedia",
            epochs=2, batch_size=12, max_length=192, learning_rate=1e-3, threads=1,
        ),
    ),
    (
        Test("squad1/test.json", 300, margin=(("f1", 0.05),)),
        Test("bioasq_factoid/test.json", margin=(("f1", 0.1), ("exact_match", 0.05))),
    ),
)  # fmt: skip

_TATOEBA = Part("tatoeba_en_zh/train.tsv", 1000)
_TATOEBA_VALID = Part("tatoeba_en_zh/valid.tsv", 50)
PROMPT = "English: {text} Chinese:"
EN_ZH = Case(
    "en-zh",
    "translate",
    "smollm2",
    (_TATOEBA, _TATOEBA_VALID),
    (
        _step(
            "translate", "en-zh", f"{{work}}/{_TATOEBA.file}", f"{{work}}/{_TATOEBA_VALID.file}",
            "--source-column", "en", "--target-column", "zh", "--template", PROMPT,
            epochs=1, batch_size=8, max_length=64, learning_rate=1e-3, rank=16, eval_samples=8, threads=1,
        ),
    ),
    (Test("tatoeba_en_zh/test.tsv", 200, margin=(("chrf", 2.0),)),),
)  # fmt: skip

CASES = {case.name: case for case in (NEWS, NEWS_GPT2, READER, EN_ZH)}
