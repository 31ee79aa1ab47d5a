"""`multilora bench generate` runs to its end on a tiny base, and would not print a figure of wrong tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.bench.generate import run as generate_run
from server.bench.generate import vllm_client
from server.bench.generate.checks import NEAR_TIE, Step, require_different, require_same
from server.bench.generate.own import Watched
from server.bench.generate.rounds import quotient, take_turns
from server.bench.generate.vllm_client import Vllm
from server.bench.measure import ContenderFailed, OutputsDiffer
from server.cli_bench import bench_app
from tests.benchmarks.generate_table import generate_table
from tests.conformance.families import build_base

SMALL = ("--adapters", "3", "--requests", "4", "--new-tokens", "8", "--rounds", "1", "--threads", "1")
FAKE_VLLM = '''
"""vLLM's interface as the script uses it; the "model" counts on from the prompt's last token, adapters in tens."""
import sys, types

class LLM:
    def __init__(self, model, dtype, enable_lora, max_loras, max_lora_rank, max_model_len, **options):
        assert dtype == "float32" and enable_lora and not options["enable_prefix_caching"]
        if model == "broken":
            print("the engine's own words")
            raise RuntimeError("no such model")
        config = types.SimpleNamespace(model_config=types.SimpleNamespace(enforce_eager=False))
        self.llm_engine = types.SimpleNamespace(vllm_config=config)
        print("not an answer")

    def generate(self, prompts, params, use_tqdm, lora_request):
        loras = lora_request or [None] * len(prompts)
        assert len(loras) == len(prompts) and params.ignore_eos and params.temperature == 0
        return [self.output(p["prompt_token_ids"][-1], l, params.max_tokens) for p, l in zip(prompts, loras)]

    def output(self, last, lora, count):
        tokens = tuple(last + i + (10 * lora.number if lora else 0) for i in range(1, count + 1))
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens)])

class SamplingParams:
    def __init__(self, **given):
        self.__dict__.update(given)

class LoRARequest:
    def __init__(self, name, number, folder):
        self.number = number

sys.modules["vllm.lora"] = types.ModuleType("vllm.lora")
sys.modules["vllm.lora.request"] = request = types.ModuleType("vllm.lora.request")
request.LoRARequest = LoRARequest
__version__ = "fake"
__path__ = []
'''


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_base("llama", tmp_path_factory.mktemp("bases")).folder)


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """An interpreter that has the fake."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM, encoding="utf-8")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return python


def test_a_run_on_a_tiny_base_has_every_figure_and_a_table(base: str, tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    done = CliRunner().invoke(bench_app, ["generate", "--base", base, *SMALL, "--output", str(out)])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["tokens_per_second"]) == {"own_base", "own_mixed", "own_one", "transformers_base"}
    assert set(result["ms_per_token"]) == {"own", "transformers", "floor"}
    assert set(result["first_token_ms"]) == {"alone", "beside"}
    assert {f"{case} p{percent}" for case in ("quiet", "arrival") for percent in (50, 99)} == set(result["gap_ms"])
    for key in ("tokens_per_second", "ms_per_token", "first_token_ms", "gap_ms", "ratios", "streaming_ratios"):
        assert all(spread["median"] > 0 for spread in result[key].values())
    assert result["long_prompt_tokens"] == 95  # of the base's 96, one is to be generated
    table = generate_table("generate", result)
    assert "| 3 adapters ÷ our base alone |" in table
    assert "--adapters 3 --requests 4 --new-tokens 8 --rounds 1" in table


def test_wrong_tokens_end_the_run_without_a_figure(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = generate_run.generate_by_adapters

    def of_the_next_adapter(adapted: Any, prompts: Any, num_tokens: int) -> list[list[Step]]:
        names = {f"a{i}": f"a{(i + 1) % 3}" for i in range(3)}
        choose = adapted.set_adapter
        monkeypatch.setattr(adapted, "set_adapter", lambda name: choose(names[name]))
        return right(adapted, prompts, num_tokens)

    def timed(*_: object) -> None:
        raise AssertionError("wrong tokens were timed")

    monkeypatch.setattr(generate_run, "generate_by_adapters", of_the_next_adapter)
    monkeypatch.setattr(generate_run, "take_turns", timed)
    out = tmp_path / "generate.json"
    done = CliRunner().invoke(bench_app, ["generate", "--base", base, *SMALL, "--out", str(out)])
    assert done.exit_code == 1
    assert "our adapters, text 0: token" in " ".join(done.output.split())
    assert not out.exists()


def test_tokens_may_part_at_a_near_tie_alone() -> None:
    clear, near = Step(5, 6, 1.0), Step(7, 8, NEAR_TIE / 2)
    assert require_same("x", [[5, 7, 5]], [[clear, near, clear]]) == 0
    assert require_same("x", [[5, 8, 9]], [[clear, near, clear]]) == 1  # the rest has another beginning
    for wrong in ([6, 7, 5], [5, 9, 5], [5, 7], [5, 7, 5, 5]):
        with pytest.raises(OutputsDiffer, match="nothing was timed"):
            require_same("x", [wrong], [[clear, near, clear]])


def test_an_adapter_that_changes_nothing_is_refused() -> None:
    with pytest.raises(OutputsDiffer, match="would not be seen"):
        require_different("adapter 0", [1, 2], [1, 2])


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []

    def turn(name: str) -> dict[str, float]:
        calls.append(name)
        return {name: float(len(calls))}

    found = take_turns([lambda: turn("a"), lambda: turn("b")], 2, lambda _: None)
    assert calls == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert quotient(found, "b", "a").high == 4 / 3


def test_waits_are_between_tokens_and_from_the_start() -> None:
    watched = Watched(started=1.0, stamps=[1.5, 2.0, 4.0])
    assert watched.first_token_s == 0.5
    assert watched.gaps_s == [0.5, 2.0]


def test_vllm_is_asked_in_a_process_of_its_own(vllm: Path) -> None:
    with Vllm(vllm, 1) as asked:
        asked.start("a base", [Path("x"), Path("y")], [0, 1, 0], [(1, 2), (3, 4), (5, 6)], 3)
        assert asked.about["version"] == "fake" and asked.about["enforce_eager"] is False
        assert asked.run("base") == [[3, 4, 5], [5, 6, 7], [7, 8, 9]]
        assert asked.run("mixed") == [[13, 14, 15], [25, 26, 27], [17, 18, 19]]
        assert asked.run("one") == [[13, 14, 15], [15, 16, 17], [17, 18, 19]]


def test_what_vllm_says_of_its_failure_is_told(vllm: Path) -> None:
    with Vllm(vllm, 1) as asked, pytest.raises(ContenderFailed, match=r"(?s)no such model.*the engine's own words"):
        asked.start("broken", [Path("x")], [0], [(1, 2)], 3)
    with Vllm(Path(sys.executable), 1) as asked, pytest.raises(ContenderFailed, match="No module named 'vllm'"):
        asked.start("a base", [Path("x")], [0], [(1, 2)], 3)


def test_vllm_that_is_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 100\n", encoding="utf-8")
    silent.chmod(0o755)
    monkeypatch.setattr(vllm_client, "_START_S", 0.2)
    with Vllm(silent, 1) as asked, pytest.raises(ContenderFailed, match="no answer within"):
        asked.start("a base", [Path("x")], [0], [(1, 2)], 3)


def test_wrong_tokens_of_vllm_end_the_run(base: str, vllm: Path, tmp_path: Path) -> None:
    out = tmp_path / "generate.json"
    asked = ["generate", "--base", base, *SMALL, "--vllm-python", str(vllm), "--out", str(out)]
    done = CliRunner().invoke(bench_app, asked)
    assert done.exit_code == 1
    assert "vLLM, base, text 0" in " ".join(done.output.split())
    assert not out.exists()


def test_vllm_is_not_given_a_file(tmp_path: Path) -> None:
    asked = ["generate", "--base", str(tmp_path / "base.gguf"), "--vllm-python", sys.executable]
    assert CliRunner().invoke(bench_app, asked).exit_code == 2
