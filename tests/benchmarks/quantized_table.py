"""The README's table of `python -m tests.benchmarks.quantized`."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.adapters_table import spread


def quantized_table(_name: str, result: dict[str, Any]) -> str:
    """Times of a forward pass, memory, and how far the answers are from those of fp32."""
    settings, machine, accuracy = result["settings"], result["machine"], result["accuracy"]
    lines = [
        "| tokens | fp32 | fp32, prepacked | int8 | int8's speed ÷ fp32's | ÷ fp32 prepacked's |",
        "|---|---|---|---|---|---|",
    ]
    for tokens, found in result["speed"].items():
        times = [spread(found["milliseconds"][name], 1, unit=" ms") for name in ("fp32", "fp32_prepacked", "int8")]
        ratios = [spread(found["int8_speedup"][name], 2) for name in ("fp32", "fp32_prepacked")]
        lines.append(f"| {int(tokens):,} | {' | '.join([*times, *ratios])} |")
    projections = {name: value / (1 << 20) for name, value in result["projection_bytes"].items()}
    process = result["process_mib"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines += [
        "",
        f"Its projections take {projections['int8']:.1f} MiB instead of {projections['fp32']:.1f}; a process that has "
        f"answered once has {process['int8']:.0f} MiB of its own, against {process['fp32']:.0f} in fp32 and "
        f"{process['fp32_prepacked']:.0f} prepacked. That leaves out the mapped checkpoint, where an fp32 base that is "
        f"not prepacked has its projections. Of {settings['texts']} texts, embeddings in int8 have a cosine of "
        f"{accuracy['cosine_mean']:.4f} with those in fp32 in the mean, {accuracy['cosine_least']:.4f} at least (an "
        f"element differs by {accuracy['embedding_mean']:.1e} in the mean, {accuracy['embedding_max']:.1e} at most); a "
        f"random adapter with {settings['labels']} labels chose the same one for {accuracy['same_label']:.1%}, its "
        f"scores differ by {accuracy['score_max']:.1e} at most. A text alone and in a batch differ by "
        f"{accuracy['alone_max']:.1e} at most. Median (low to high) of {settings['rounds']} interleaved rounds, "
        f"{settings['threads']} threads of {machine['processor']}; {versions}. Made by "
        f"`python -m tests.benchmarks.quantized`.",
        "",
    ]
    return "\n".join(lines)
