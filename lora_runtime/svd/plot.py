"""The picture of a report: how much of each site's change a rank keeps, and what the chosen ranks cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_runtime.svd.sites import SiteReport

_MAX_KINDS = 10  # colours that can be told apart; the smallest kinds share the last


def plot_sites(sites: Sequence[SiteReport], path: Path) -> None:
    """Write a PNG of two panels: energy over rank, a line for each site; relative error over depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    kinds = _kinds(sites)
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for site in sites:
        colour = f"C{kinds[site.kind]}"
        left.plot(list(site.energy_at), list(site.energy_at.values()), color=colour, alpha=0.45, linewidth=1.1)
        left.plot([site.rank], [site.energy], "o", color=colour, markersize=3.5)
    _label(left, "rank", "share of ‖delta‖² kept", "Energy by rank; the dots are the chosen ranks")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 16 instead of 2⁴
    left.set_ylim(0, 1.02)
    for kind, number in kinds.items():
        places = [place for place, site in enumerate(sites) if site.kind == kind]
        errors = [sites[place].error for place in places]
        right.plot(places, errors, "o", color=f"C{number}", markersize=4, label=_legend(kind, kinds))
    _label(right, "site, in the order of the table", "‖delta − BA‖ / ‖delta‖", "Relative error of each site")
    right.set_ylim(bottom=0)
    handles, names = right.get_legend_handles_labels()
    shown = dict(zip(names, handles, strict=True))  # one entry for all kinds that share the last colour
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def _kinds(sites: Sequence[SiteReport]) -> dict[str, int]:
    """Kind → number of its colour, in the order of the model; the rarest share one where there are too many."""
    ordered = list(dict.fromkeys(site.kind for site in sites))
    return {kind: min(number, _MAX_KINDS - 1) for number, kind in enumerate(ordered)}


def _legend(kind: str, kinds: dict[str, int]) -> str:
    return "others" if len(kinds) > _MAX_KINDS and kinds[kind] == _MAX_KINDS - 1 else kind


def _label(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
