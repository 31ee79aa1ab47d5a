"""The README's table of `multilora bench adapters`."""

from __future__ import annotations

from typing import Any


def adapters_table(name: str, result: dict[str, Any]) -> str:
    """What was measured, with the target beside it; a target that is missed says so."""
    scale, machine, parts = result["settings"]["scale"], result["machine"], result["parts"]
    lines = ["| measured | median (low to high) | target |", "|---|---|---|"]
    lines += [row for part, rows in _ROWS.items() if part in parts for row in rows(parts[part], scale)]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines += [
        "",
        f"A `multilora serve` in a process of its own, its gRPC clients in another; adapters of rank "
        f"{result['settings']['rank']} on query and value with heads of their own, "
        f"{result['settings']['threads']} threads of {machine['processor']} ({machine['cores']} cores for server and "
        f"clients together); {versions}. {result['answers_checked']:,} answers were compared with PEFT's, the largest "
        f"error was {result['largest_error']:.0e}. Made by `multilora bench adapters --out "
        f"tests/benchmarks/results/{name}.json`.",
        "",
    ]
    return "\n".join(lines)


def _many(part: dict[str, Any], scale: dict[str, Any]) -> list[str]:
    targets, start, lists = part["targets"], part["start"], part["list_seconds"]
    many = f"{scale['registered']:,} adapters registered, {scale['resident']:,} in memory, {scale['asked']} asked"
    return [
        row(f"texts/s, {scale['few']} adapters registered and asked", spread(part["texts_per_second"]["few"], 0)),
        row(f"texts/s, {many}", spread(part["texts_per_second"]["many"], 0)),
        row("the second ÷ the first", spread(part["ratio"], 2), targets["throughput, many ÷ few"]),
        row("the same, both asked for the same few adapters", spread(part["ratio_same_requests"], 2)),
        row(
            f"`ListAdapters`, a page of 1000 of {scale['registered']:,}",
            spread(lists["1000"], 0, 1e3, " ms"),
            targets["ListAdapters, page of 1000, seconds"],
            (1e3, " ms"),
        ),
        row(
            f"start with {scale['registered']:,} folders, without the base's load",
            spread(start["seconds"], 1, 1, " s"),
            targets["start-up without the base's load, seconds"],
            (1, " s"),
        ),
    ]


def _cold(part: dict[str, Any], scale: dict[str, Any]) -> list[str]:
    ratio = part["targets"]["cold answer ÷ (bytes + one warm answer)"]
    return [
        row(
            f"first answer of an adapter that is not in memory, {scale['cold']} of them",
            spread(part["seconds"]["cold"], 1, 1e3, " ms"),
        ),
        row("an answer of one that is", spread(part["seconds"]["warm"], 1, 1e3, " ms")),
        row("the first ÷ (the second + reading and copying its bytes), medians", f"{ratio['value']:.2f}", ratio),
    ]


def _storm(part: dict[str, Any], scale: dict[str, Any]) -> list[str]:
    targets = part["targets"]
    return [
        row(
            f"p99 of {scale['storm_clients']} clients, nothing loaded",
            spread(part["p99_seconds"]["quiet"], 0, 1e3, " ms"),
        ),
        row(
            f"p99 while {scale['loads_per_s']:g} other adapters are loaded and unloaded each second",
            spread(part["p99_seconds"]["storm"], 0, 1e3, " ms"),
        ),
        row("the second ÷ the first", spread(part["ratio_p99"], 2), targets["p99 in the storm ÷ p99 before it"]),
        row(f"failed calls, {part['loads']} loads", str(part["failed"]), targets["failed calls"]),
    ]


def _replace(part: dict[str, Any], scale: dict[str, Any]) -> list[str]:
    counts, targets = part["counts"], part["targets"]
    label = f"{scale['replace_clients']} clients, {part['moves']} moves of an alias, {counts['answered']:,} answers"
    return [
        row(f"{label}: failed", str(counts["failed"]), targets["failed calls"]),
        row(f"{label}: of neither version", str(counts["neither"]), targets["answers of neither version"]),
        row(f"{label}: old after the move was answered", str(counts["old"]), targets["old answers after a move"]),
    ]


def _memory(part: dict[str, Any], scale: dict[str, Any]) -> list[str]:
    targets, churn = part["targets"], part["churn"]
    ratio = targets["arena bytes ÷ parameter bytes, largest"]
    after = targets["arena bytes after unloading all"]
    operations = sum(churn["operations"].values())
    return [
        row("bytes of memory ÷ bytes of parameters, the largest of five shapes", f"{ratio['value']:.4f}", ratio),
        row("bytes held after everything was unloaded", f"{after['value']:.0f}", after),
        row(
            f"growth of the process over {operations:,} loads, unloads and answers of one adapter by "
            f"{scale['churn_threads']} threads",
            f"{churn['rss_growth_bytes'] / 2**20:.1f} MiB",
        ),
    ]


_ROWS = {"many": _many, "cold": _cold, "storm": _storm, "replace": _replace, "memory": _memory}


def row(label: str, value: str, target: dict[str, Any] | None = None, unit: tuple[float, str] = (1, "")) -> str:
    if target is None:
        return f"| {label} | {value} | |"
    factor, name = unit
    sign, limit = ("≤", target["at_most"]) if "at_most" in target else ("≥", target["at_least"])
    missed = "" if target["met"] else ", missed"
    return f"| {label} | {value} | {sign} {limit * factor:g}{name}{missed} |"


def spread(spread: dict[str, Any], digits: int, factor: float = 1, unit: str = "") -> str:
    median, low, high = (f"{spread[key] * factor:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median}{unit} ({low} to {high})"
