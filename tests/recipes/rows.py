"""The test splits, read by themselves: not by the code that is judged."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What is sent, and what would be right."""

    text: str  # a question, where there is a context
    wanted: tuple[str, ...]
    context: str = ""


def read_rows(path: Path) -> list[Row]:
    """Of ag_news's CSV, SQuAD's JSON, or Tatoeba's TSV."""
    if path.suffix == ".json":
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [
            Row(question["question"], tuple(answer["text"] for answer in question["answers"]), paragraph["context"])
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".tsv":
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [Row(row["en"], (row["zh"],)) for row in rows]
        return [Row(row["text"], (row["label"],)) for row in csv.DictReader(file)]


@dataclass(frozen=True)
class Part:
    """The first rows of a training file, so that a recipe fits 2 cores: written as a file of the same form."""

    source: str  # under the data folder
    count: int  # questions or lines

    @property
    def file(self) -> str:
        """Under the work folder."""
        path = Path(self.source)
        return f"rows/{path.parent.name}-{path.stem}-{self.count}{path.suffix}"

    def write(self, data: Path, work: Path) -> None:
        out = work / self.file
        out.parent.mkdir(parents=True, exist_ok=True)
        text = (data / self.source).read_text(encoding="utf-8")
        out.write_text(self._questions(text) if out.suffix == ".json" else self._lines(text), encoding="utf-8")

    def _lines(self, text: str) -> str:
        return "\n".join(text.split("\n")[: 1 + self.count]) + "\n"

    def _questions(self, text: str) -> str:
        left, articles = self.count, []
        for article in json.loads(text)["data"]:
            paragraphs = []
            for paragraph in article["paragraphs"]:
                questions = paragraph["qas"][:left]
                left -= len(questions)
                if questions:
                    paragraphs.append({**paragraph, "qas": questions})
            articles.append({**article, "paragraphs": paragraphs})
        return json.dumps({"version": "1.1", "data": [article for article in articles if article["paragraphs"]]})
