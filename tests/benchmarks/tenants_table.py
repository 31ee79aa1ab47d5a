"""The README's table of `multilora bench tenants`."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.adapters_table import row, spread


def tenants_table(name: str, result: dict[str, Any]) -> str:
    """What was measured, with the target beside it; a target that is missed says so."""
    machine, parts, threads = result["machine"], result["parts"], result["settings"]["threads"]
    lines = ["| measured | median (low to high) | target |", "|---|---|---|"]
    lines += [row for part, rows in _ROWS.items() if part in parts for row in rows(parts[part])]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines += [
        "",
        f"A `multilora serve` in a process of its own, its gRPC clients in another, an API key and an adapter for each "
        f"tenant; {threads} thread{'s' if threads > 1 else ''} of {machine['processor']} ({machine['cores']} cores for "
        f"server and clients together); {versions}. {result['answers_checked']:,} answers were compared with PEFT's, "
        f"the largest error was {result['largest_error']:.0e}. Made by `multilora bench tenants "
        f"--threads {threads} --out tests/benchmarks/results/{name}.json`.",
        "",
    ]
    return "\n".join(lines)


def _noisy(part: dict[str, Any]) -> list[str]:
    rows = []
    for budget, found in part["budgets"].items():
        p99, ratio = found["p99_seconds"], found["ratio_p99"]
        label = f"`--token-budget {budget}`"
        rows += [
            row(f"{label}: texts/s that it answers", spread(found["texts_per_s"], 0)),
            row(f"{label}: p99 of steady tenants alone", spread(p99["alone"], 0, 1e3, " ms")),
            row(f"{label}: p99 beside one that sends 10 times as much", spread(p99["noisy"], 0, 1e3, " ms")),
            row(f"{label}: the same, that one with 8 calls at once", spread(p99["limited"], 0, 1e3, " ms")),
            row(f"{label}: the second ÷ the first", spread(ratio["noisy"], 1), _TWICE | _met(ratio["noisy"])),
            row(f"{label}: the third ÷ the first", spread(ratio["limited"], 1), _TWICE | _met(ratio["limited"])),
        ]
    failed = part["targets"]["failed calls of steady tenants"]
    return [*rows, row("failed calls of steady tenants", str(failed["value"]), failed)]


_TWICE: dict[str, Any] = {"at_most": 2.0}


def _met(ratio: dict[str, Any]) -> dict[str, Any]:
    return {"met": ratio["median"] <= _TWICE["at_most"]}


def _shares(part: dict[str, Any]) -> list[str]:
    shares = " : ".join(f"{7 * share:.2f}" for share in part["shares"].values())
    (target,) = part["targets"].values()
    return [
        row("tokens of saturated tenants of weights 1 : 2 : 4", shares),
        row("largest relative error of a share", f"{100 * target['value']:.1f} %", target, (100, " %")),
    ]


_SERVERS = {
    "default": "as it comes",
    "no-early-refusal": "`--refuse-early no`",
    "short-queue": "`--max-queued-sequences` of one second's work",
}


def _overload(part: dict[str, Any]) -> list[str]:
    rows = []
    for server, found in part["servers"].items():
        target = part["targets"][f"goodput ÷ peak, {server}"]
        label = f"3 times what can be answered, deadlines of {part['deadline_seconds']:g} s, {_SERVERS[server]}"
        rows.append(row(f"{label}: texts/s in time ÷ texts/s at most", spread(found["ratio"], 2), target))
        refusal = part["targets"].get(f"median latency of a refusal, {server}, seconds")
        if refusal is not None:
            rows.append(row(f"{label}: a refusal", f"{1e3 * refusal['value']:.1f} ms", refusal, (1e3, " ms")))
    growth = part["targets"]["growth of a server's memory, MiB"]
    return [*rows, row("growth of a server's memory meanwhile", f"{growth['value']:.1f} MiB", growth, (1, " MiB"))]


def _cancels(part: dict[str, Any]) -> list[str]:
    settled = part["targets"]["seconds after the last until nothing is held"]
    outcomes = part["outcomes"]
    label = f"{outcomes['cancelled']:,} cancelled calls and {outcomes['expired']:,} expired deadlines"
    return [
        row(f"{label}: until nothing is held after the last", f"{settled['value']:.2f} s", settled, (1, " s")),
        row(f"{label}: sequences, requests and tickets left", f"{sum(part['left'].values()):.0f}"),
    ]


_ROWS = {"noisy": _noisy, "shares": _shares, "overload": _overload, "cancels": _cancels}
