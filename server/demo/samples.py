"""The demo's data: small cuts of three public sets, with the hyper-parameters that suit each.

What they are and whose they are stands in `data/ATTRIBUTION.md`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One text and the name of its label."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters for a 22M-parameter encoder on the sample's ~200 rows."""

    rank: int
    learning_rate: float
    epochs: int
    batch_size: int = 16
    max_length: int = 64  # tokens; one message of sms_spam is longer, and cut


@dataclass(frozen=True, slots=True)
class Sample:
    """One data set. `test` comes from the source's own held-out rows; `labels` are sorted."""

    name: str
    train: tuple[SampleRow, ...]
    test: tuple[SampleRow, ...]
    labels: tuple[str, ...]

    def write_train_csv(self, folder: Path) -> Path:
        """Write the training rows to `folder/<name>.csv` as `multilora train classify` reads them."""
        path = folder / f"{self.name}.csv"
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "label"))
            writer.writerows((row.text, row.label) for row in self.train)
        return path


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "sms_spam": Recipe(rank=8, learning_rate=1e-3, epochs=6),
        "snips": Recipe(rank=8, learning_rate=2e-3, epochs=6),
        "banking77": Recipe(rank=16, learning_rate=2e-3, epochs=5),
    }
)
SAMPLE_NAMES = tuple(RECIPES)


def load_sample(name: str) -> Sample:
    """Read one of `SAMPLE_NAMES` from the package; raises KeyError for another name."""
    if name not in RECIPES:
        raise KeyError(f"no sample {name!r}; there are {', '.join(SAMPLE_NAMES)}")
    source = resources.files("server.demo") / "data" / f"{name}.csv"
    splits: dict[str, list[SampleRow]] = {"train": [], "test": []}
    for row in csv.DictReader(io.StringIO(source.read_text(encoding="utf-8"))):
        splits[row["split"]].append(SampleRow(row["text"], row["label"]))
    labels = tuple(sorted({row.label for rows in splits.values() for row in rows}))
    return Sample(name, tuple(splits["train"]), tuple(splits["test"]), labels)
