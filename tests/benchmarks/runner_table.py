"""The README's table of `python -m tests.benchmarks.runner`."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.adapters_table import spread


def runner_table(_name: str, result: dict[str, Any]) -> str:
    """Of each base and batch: the base's speed, and what adapters leave of it."""
    settings, machine = result["settings"], result["machine"]
    lines = [
        "| base, batch | base alone, tokens/s | one adapter ÷ base | many ÷ base | many ÷ one | many ÷ those of 10 |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        ratios, how = result["ratios"], "eager"

        def of(a: str, b: str, name: str = case["name"]) -> str:
            return spread(ratios[f"{name}: {a}, {how} / {b}, {how}"], 2)  # noqa: B023 - called at once

        # both are ratios to the same adapter's time, so their quotient is that of the two
        few, many = (ratios[f"{case['name']}: over {count}, {how} / identical, {how}"]["median"] for count in (10, 200))
        speed = spread(case["tokens_per_second"][f"base, {how}"], 0)
        cells = [of("identical", "base"), of("over 200", "base"), of("over 200", "identical"), f"{many / few:.2f}"]
        lines.append(f"| {case['name']}, {case['distinct']['over 200']} adapters | {speed} | {' | '.join(cells)} |")
    if settings["device"] == "cpu":
        command = "python -m tests.benchmarks.runner --device cuda --dtype bfloat16"
        lines.append(f"| any on a GPU | not measured: `{command}` | | | | |")
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    error = max(error for case in result["cases"] for error in case["errors"].values())
    lines += [
        "",
        f"Random weights in the shapes named, rank {result['rank']} on every linear layer, {result['tokens_per_row']} "
        f"tokens a sequence, backend {result['cases'][0]['backend']}. Medians (low to high) of {settings['rounds']} "
        f"interleaved rounds, {settings['dtype']}, {settings['threads']} threads of {machine['processor']}, load "
        f"average before the start {result['load_average']:.1f}; {versions}. Largest relative error against one "
        f"adapter at a time: {error:.0e}. Made by `python -m tests.benchmarks.runner --shapes "
        f"{','.join(settings['shapes'])} --rounds {settings['rounds']}`.",
        "",
    ]
    return "\n".join(lines)
