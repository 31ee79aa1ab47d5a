"""A run's report: what its text says, that its picture fits any run, and that serving does not mind it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from lora_runtime.adapters.folder import open_folder
from lora_runtime.adapters.inspect import inspect_adapter
from lora_runtime.adapters.sources.names import select_files
from lora_runtime.errors import InvalidRequest
from lora_runtime.train.metrics.classes import LabelScore
from lora_runtime.train.report.markdown import MAX_HISTORY_ROWS, render_markdown
from lora_runtime.train.report.run import Confusion, Example, HistoryPoint, RunReport
from lora_runtime.train.report.write import FIGURE_FILE, MARKDOWN_FILE, write_report
from server.control_cli.upload import select_files as select_to_send
from tests.unit.base_specs import spec_of
from tests.unit.peft_folders import save


def report(
    num_points: int = 3, num_labels: int = 2, metrics: tuple[str, ...] = ("accuracy", "macro_f1"), label: str = "label"
) -> RunReport:
    history = tuple(
        HistoryPoint(10 * n, float(n), 1 / n, 1.5 / n, {name: 0.5 + 0.4 * n / num_points for name in metrics})
        for n in range(1, num_points + 1)
    )
    labels = tuple(f"{label} {n}" for n in range(num_labels))
    counts = (np.eye(num_labels, dtype=int) * 8 + 1).tolist()
    return RunReport(
        title="News topics",
        base="MiniLM",
        task="classify",
        settings={"rank": 16, "targets": ("query", "value"), "names": frozenset({"b", "a"})},
        rows={"training": 8000, "validation": 1000},
        history=history,
        best=history[-1],
        selected_by=metrics[0],
        baseline=dict.fromkeys(metrics, 0.25),
        baseline_of="always the same answer",
        seconds=421.3,
        versions={"torch": "2.13"},
        label_scores=tuple(LabelScore(name, 0.9, 0.8, 0.85, 1200) for name in labels),
        confusion=Confusion(labels, counts) if num_labels else None,
        examples=(Example("A match.", "Sports", "World"),),
    )


def test_the_text_says_what_was_reached_from_what_with_what() -> None:
    text = render_markdown(report(), "report.png")
    for line in (
        "# News topics",
        "- rows: 8,000 training, 1,000 validation",
        "- best: epoch 3, step 30, by accuracy",
        "- time: 7 min 1 s",
        "| accuracy | 90.0 % | 25.0 % |",
        "| macro-F1 | 0.900 | 0.250 |",
        "![Loss and metrics over the run](report.png)",
        "| 10 | 1 | 1.0000 | 1.5000 | 63.3 % | 0.633 |  |",
        "| 30 | 3 | 0.3333 | 0.5000 | 90.0 % | 0.900 | best |",
        "| 2 | label 1 | 0.900 | 0.800 | 0.850 | 1,200 |",
        "| label 0 | label 1 | 1 | 10.0 % |",
        "| A match. | Sports | World |",
        "| targets | query, value |",
        "| names | a, b |",
        "| torch | 2.13 |",
    ):
        assert line in text.splitlines()


def test_a_section_without_content_is_left_out() -> None:
    bare = replace(report(num_labels=0), examples=(), settings={}, label_scores=())
    titles = [line for line in render_markdown(bare, "p.png").splitlines() if line.startswith("## ")]
    assert titles == ["## Result", "## History", "## Versions"]


def test_texts_of_the_data_cannot_become_markup_or_break_a_table() -> None:
    hostile = "a | b\n\n# c `d` <img src=x> [e](f)\u2028 \x1b[31m \ud800"
    text = render_markdown(replace(report(), examples=(Example(hostile, "x" * 400, ""),)), "p.png")
    row = next(line for line in text.splitlines() if line.startswith("| a \\|"))
    assert row.startswith(r"| a \| b \# c \`d\` \<img src=x\> \[e\](f) ")
    assert "\x1b" not in row
    assert row.endswith(f"| {'x' * 159}… |  |")
    text.encode()


def test_a_long_history_shows_its_ends_and_the_best() -> None:
    long = report(num_points=500)
    long = replace(long, best=long.history[137])
    text = render_markdown(long, "p.png")
    rows = [line for line in text.splitlines() if line.endswith(" best |") or line.startswith(("| 10 |", "| 5000 |"))]
    assert [row.split(" | ")[0] for row in rows] == ["| 10", "| 1380", "| 5000"]
    table = text.split("## History")[1].split("## ")[0]
    assert table.count("\n| ") <= MAX_HISTORY_ROWS + 3
    assert "of 500 validation passes" in table


def level_texts(figure: Figure) -> list[Text]:
    """The texts of a picture that are not slanted, without labels of ticks out of sight."""
    hidden: set[Text] = set()
    for axes in figure.findobj(Axes):
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [tick for tick in axis.get_major_ticks() if not min(low, high) <= tick.get_loc() <= max(low, high)]
            hidden |= {tick.label1 for tick in ticks}
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text not in hidden]
    return [t for t in texts if t.get_text().strip() and t.get_visible() and t.get_rotation() in (0, 90)]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda: report(1, 0), id="one point"),
        pytest.param(lambda: report(50, 40, label="a rather long name of a label"), id="fifty points, forty labels"),
        pytest.param(lambda: report(5, 41), id="more labels than a matrix holds"),
        pytest.param(lambda: report(5, 12, label="标签"), id="Chinese labels"),
        pytest.param(lambda: report(4, 0, ("bleu", "chrf", "perplexity")), id="three axes"),
        pytest.param(lambda: report(4, 3, label="$x^{"), id="dollars"),
    ],
)
def test_the_picture_fits_every_run_and_no_text_covers_another(
    tmp_path: Path, run: Callable[[], RunReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (savefig(self, *a, **k), drawn.append(self)))
    write_report(tmp_path, run())
    pixels = imread(tmp_path / FIGURE_FILE)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 900
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge[..., :3] == 1).all(), "something is cut at the edge"
    flat = level_texts(drawn[0])
    boxes = [text.get_window_extent() for text in flat]
    for index, box in enumerate(boxes):
        for other, text in zip(boxes[index + 1 :], flat[index + 1 :], strict=True):
            covered = box.intersection(box, other)
            assert covered is None or min(covered.width, covered.height) < 1, (flat[index].get_text(), text.get_text())


def test_a_picture_with_losses_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    points = (
        HistoryPoint(1, 0.5, None, math.inf, {"accuracy": math.nan}),
        HistoryPoint(2, 1.0, None, 0.5, {}),
    )
    write_report(tmp_path, replace(report(), history=points, best=points[1]))
    assert "| 1 | 0.5 |  | inf | nan % |  |" in (tmp_path / MARKDOWN_FILE).read_text()


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report())
    for file in (MARKDOWN_FILE, FIGURE_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InvalidRequest, match=r"pip install 'multilora\[train\]'"):
        write_report(tmp_path, report())
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_with_a_report_is_the_same_adapter(tmp_path: Path) -> None:
    folder = save("bert", "SEQ_CLS", tmp_path / "news", target_modules=["query", "value"])
    before = inspect_adapter(folder, spec_of("bert"))
    files = {path.name for path in folder.iterdir()}
    write_report(folder, report())
    assert before.digest is not None
    assert inspect_adapter(folder, spec_of("bert")) == before
    assert open_folder(folder).home == folder
    assert set(select_files([path.name for path in folder.iterdir()], "hf://news")) == files
    sent = select_to_send(folder)
    assert set(sent.sent) == files
    assert sent.skipped == (MARKDOWN_FILE, FIGURE_FILE)
