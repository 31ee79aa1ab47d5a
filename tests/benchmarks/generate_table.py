"""The README's table of `multilora bench generate`."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.adapters_table import spread

_FEWEST_ROUNDS = 3  # that a figure is to be read as one
_CONTENDERS = {
    "own_base": "multilora, base alone",
    "own_mixed": "multilora, {num_adapters} adapters",
    "own_one": "multilora, one adapter for all",
    "transformers_base": "transformers, base alone, its forward in a loop",
    "vllm_base": "vLLM, base alone, its engine ready for adapters",
    "vllm_mixed": "vLLM, {num_adapters} adapters",
    "vllm_one": "vLLM, one adapter for all",
}
_RATIOS = {
    "own_mixed / own_base": "{num_adapters} adapters ÷ our base alone",
    "own_one / own_base": "one adapter ÷ our base alone",
    "own_mixed / own_one": "{num_adapters} adapters ÷ one adapter",
    "own_base / transformers_base": "our base alone ÷ transformers'",
    "own_base / vllm_base": "our base alone ÷ vLLM's",
    "own_mixed / vllm_mixed": "our {num_adapters} adapters ÷ vLLM's",
    "own_one / vllm_one": "our one adapter ÷ vLLM's",
    "vllm_mixed / vllm_base": "vLLM: {num_adapters} adapters ÷ base alone",
    "single stream, own / transformers": "a text alone: our speed ÷ transformers'",
    "single stream, own / floor": "a text alone: our speed ÷ what the memory's bandwidth allows",
}
_SINGLE = {
    "own": "a text alone, multilora, a token",
    "transformers": "a text alone, transformers, a token",
    "floor": "reading the weights once",
}
_STREAMS = {
    "first_token_ms": {
        "alone": "first token of a text, nobody beside it",
        "beside": "first token of a text, {others} others decoding",
    },
    "gap_ms": {
        "quiet p50": "from token to token, {others} texts: median",
        "quiet p99": "the same: p99",
        "arrival p50": "the same with a prompt of {long} tokens arriving: median",
        "arrival p99": "the same: p99",
    },
}


def generate_table(name: str, result: dict[str, Any]) -> str:
    """Speeds of the contenders, their ratios, and what a stream's reader waits for."""
    settings = result["settings"]
    names = {
        "num_adapters": settings["num_adapters"],
        "others": settings["requests"] - 1,
        "long": result["long_prompt_tokens"],
    }

    def rows(key: str, labels: dict[str, str], digits: int, unit: str = "") -> list[str]:
        found = result[key]
        return [f"| {labels[at].format(**names)} | {spread(found[at], digits, unit=unit)} |" for at in found]

    lines = [f"| {settings['requests']} texts at once | tokens/s, median (low to high) |", "|---|---|"]
    lines += rows("tokens_per_second", _CONTENDERS, 1)
    lines += ["", "| ratio of speed, round by round | median (low to high) |", "|---|---|"]
    lines += rows("ratios", _RATIOS, 2)
    lines += ["", "| a reader waits for | median (low to high) |", "|---|---|"]
    lines += rows("ms_per_token", _SINGLE, 1, " ms")
    for key, labels in _STREAMS.items():
        lines += rows(key, labels, 1, " ms")
    lines += [f"| {ratio} | {spread(found, 2)} |" for ratio, found in result["streaming_ratios"].items()]
    return "\n".join([*lines, "", _footnote(name, result), ""])


def _footnote(name: str, result: dict[str, Any]) -> str:
    settings, machine, checked = result["settings"], result["machine"], result["checked"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    if (vllm := result.get("vllm")) is not None:
        versions += f", vLLM {vllm['version']} ({'eager' if vllm['enforce_eager'] else 'compiled'})"
    ranks = " and ".join(map(str, settings["ranks"]))
    option = " --vllm-python PYTHON" if "vllm" in result else ""
    parted = f"{sum(checked.values())} of the compared texts parted at a near tie" if any(checked.values()) else ""
    short = "A run this short shows that it works, not how fast it is. " if settings["rounds"] < _FEWEST_ROUNDS else ""
    return (
        f"{short}{result['base']} in fp32, greedy: {settings['requests']} prompts of {settings['prompt_tokens']} "
        f"tokens, {settings['new_tokens']} generated after each, random adapters of ranks {ranks} on every linear "
        f"layer, no cache of prompts. The weights are {result['weight_bytes'] / 1e6:.0f} MB, read at "
        f"{result['bytes_per_second']['median'] / 1e9:.1f} GB/s at best. Tokens were compared with transformers' and "
        f"PEFT's first: {parted or 'all are the same'}. {settings['rounds']} interleaved rounds, "
        f"{settings['threads']} threads of {machine['processor']}, load average before the start "
        f"{result['load_average']:.1f}; {versions}. Made by `multilora bench generate --base BASE --adapters "
        f"{settings['num_adapters']} --requests {settings['requests']} --new-tokens {settings['new_tokens']} --rounds "
        f"{settings['rounds']} --threads {settings['threads']}{option} --out tests/benchmarks/results/{name}.json`."
    )
