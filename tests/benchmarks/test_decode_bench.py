"""The decode benchmark's texts are checked before they are timed, and its file says what a table needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_runtime.generation import Sample
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.tokens import SampledToken, TokenLogprob
from server.bench.measure import OutputsDiffer
from tests.benchmarks import decode
from tests.benchmarks.decode import main
from tests.benchmarks.decode_problem import random_prompts

SMALL = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--texts", "2", "--contexts", "16"]
SHORT = ["--new-tokens", "8", "--rounds", "1", "--threads", "1"]


def test_a_small_run_writes_the_share_of_the_ceiling(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    assert main([*SMALL, *SHORT, "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    (case,) = result["cases"]
    assert case["parted_at_near_ties"] == 0
    kept = case["bytes"]["weights"] + case["bytes"]["kv"]
    ceiling = kept / (kept + case["bytes"]["adapters"])
    step = case["ms_per_step"]
    assert case["share_of_ceiling"] == pytest.approx(step["base"]["median"] / step["mixed"]["median"] / ceiling)
    assert case["bytes"]["kv"] == 2 * 16 * (2 * 2 * 2 * 16 * 4), "texts, tokens; k and v, layers, heads, width, bytes"
    assert result["ratios"]["tiny, 2 texts, context 16: mixed / base"]["median"] > 0


def test_another_text_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode.tokens_of
    seen: list[int] = []

    def wrong_once(sample: Sample) -> list[int]:
        seen.append(1)
        return [1, *whole(sample)[1:]] if len(seen) > 2 else whole(sample)

    monkeypatch.setattr(decode, "tokens_of", wrong_once)
    assert main([*SMALL, *SHORT, "--out", str(tmp_path / "x.json")]) == 1
    assert not (tmp_path / "x.json").exists()


def test_a_near_tie_is_no_error_and_anything_else_is() -> None:
    best = (TokenLogprob(5, -1.0), TokenLogprob(7, -1.05), TokenLogprob(8, -3.0))
    token = SampledToken(5, -1.0, best)
    sample = Sample("", (token,), FinishReason.LENGTH)
    assert not decode._parts("x", [5], sample, 0.1)
    assert decode._parts("x", [7], sample, 0.1)
    for wrong in (8, 9):
        with pytest.raises(OutputsDiffer, match="token 0"):
            decode._parts("x", [wrong], sample, 0.1)


def test_prompts_are_alike_from_run_to_run() -> None:
    assert random_prompts(2, 5, 90) == random_prompts(2, 5, 90)
    assert all(0 < token < 90 for prompt in random_prompts(3, 40, 90) for token in prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "tiny", "--contexts", "16"], "not between"),
        (["--shape", "huge"], "invalid choice"),
        pytest.param(
            ["--shape", "tiny"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
