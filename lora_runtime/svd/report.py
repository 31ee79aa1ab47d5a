"""The findings of an extraction or a compression as files: JSON for machines, Markdown and a picture for people."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from lora_runtime.errors import InvalidRequest
from lora_runtime.svd.compress import CompressReport
from lora_runtime.svd.extract import ExtractReport
from lora_runtime.svd.plot import plot_sites
from lora_runtime.svd.sites import SiteReport, Summary

Report = ExtractReport | CompressReport

_PERCENT = "{:.2%}"


def check_can_report(folder: Path) -> None:
    """Raise InvalidRequest, before any work, where a report could not be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequest("report", "its picture needs matplotlib: pip install '.[plots]' in the repository")
    if folder.exists() and not folder.is_dir():
        raise InvalidRequest("report", f"{folder} exists and is not a folder")


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write NAME.json, NAME.md and NAME.png, NAME being extract or compress; the files that were written."""
    name = "extract" if isinstance(report, ExtractReport) else "compress"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {**asdict(report), "out": report.out.name}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(_markdown(report, f"{name}.png"), encoding="utf-8")
        plot_sites(report.sites, folder / f"{name}.png")
    except OSError as error:
        raise InvalidRequest("report", f"{folder} cannot be written ({error.strerror})") from error
    return tuple(folder / f"{name}.{ending}" for ending in ("json", "md", "png"))


def _markdown(report: Report, picture: str) -> str:
    extracted = isinstance(report, ExtractReport)
    title = "LoRA extracted from a fine-tuned model" if extracted else "An adapter compressed"
    parts = [f"# {title}", "", *(f"- {line}" for line in summary_lines(report)), "", f"![energy by rank]({picture})"]
    header = ["site", "shape", "rank", "energy kept", "relative error", "‖delta‖ / ‖W‖" if extracted else "rank before"]
    parts += ["", "## Sites", "", _table(header, map(site_cells, report.sites))]
    if isinstance(report, ExtractReport):
        carried = [(item.name, item.how, change_text(item.relative_change)) for item in report.carried]
        parts += ["", "## Carried beside LoRA", "", _table(["what", "how", "relative change"], carried)]
        left = [(item.name, item.reason, change_text(item.relative_change)) for item in report.not_carried]
        parts += ["", "## Not carried", ""]
        parts.append(_table(["what", "why", "relative change"], left) if left else "Nothing was left behind.")
    return "\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def site_cells(site: SiteReport) -> tuple[str, ...]:
    """A site's row: name, shape, rank, energy, error, and its size beside W or its rank before."""
    last = change_text(site.relative_change) if site.old_rank is None else str(site.old_rank)
    shape = "×".join(map(str, site.shape))
    return site.name, shape, str(site.rank), _PERCENT.format(site.energy), f"{site.error:.2e}", last


def change_text(change: float | None) -> str:
    """A relative change; what the base has none of, or zeros, is new."""
    return "new" if change is None else f"{change:.2e}"


def summary_lines(report: Report) -> tuple[str, ...]:
    """The run in a few sentences."""
    summary = report.summary
    if isinstance(report, CompressReport):
        stay = f", {summary.num_unchanged} of them left as they were" if summary.num_unchanged else ""
        first = f"{summary.num_sites} sites{stay}"
        size = f"{_mib(report.num_old_bytes)} → {_mib(summary.num_bytes)} of weights"
    else:
        same = f", {summary.num_unchanged} more are the base's own" if summary.num_unchanged else ""
        first = f"{summary.num_sites} sites for the task {report.task}{same}"
        size = f"{_mib(summary.num_bytes)} of weights"
    kept = f"{_PERCENT.format(summary.energy)} of the change's energy is kept; relative error {summary.error:.2e}"
    return first, kept, f"{size}: {_parameters(summary)}", *(f"note: {note}" for note in report.notes)


def _parameters(summary: Summary) -> str:
    return f"{summary.num_lora_parameters:,} parameters of LoRA, {summary.num_whole_parameters:,} carried whole"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
