"""vLLM in an interpreter of its own: reads JSON lines on stdin, answers with JSON lines. Imports nothing of ours.

The first line is the job: `base`, `prompts` (token ids), `adapters` (folders), `owners` (of each prompt, an index of
them), `num_tokens`, `max_model_len`, `max_lora_rank`. It is answered with `version` and `enforce_eager`. Each next line
is `{"run": "base" | "mixed" | "one"}`, answered with `seconds` and `tokens`. What fails is answered with `error`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Asked:
    """vLLM with the job's base, adapters and prompts."""

    def __init__(self, job: dict[str, Any]) -> None:
        vllm: Any = importlib.import_module("vllm")
        lora: Any = importlib.import_module("vllm.lora.request")
        self.version = str(vllm.__version__)
        self._llm = vllm.LLM(
            model=job["base"],
            dtype="float32",
            enable_lora=True,
            max_loras=max(1, len(job["adapters"])),
            max_lora_rank=job["max_lora_rank"],
            max_model_len=job["max_model_len"],
            enable_prefix_caching=False,
            seed=0,
        )
        self.enforce_eager = bool(self._llm.llm_engine.vllm_config.model_config.enforce_eager)
        self._params = vllm.SamplingParams(temperature=0, max_tokens=job["num_tokens"], ignore_eos=True)
        self._prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        loras = [lora.LoRARequest(f"a{i}", i + 1, folder) for i, folder in enumerate(job["adapters"])]
        self._loras: dict[str, list[Any] | None] = {
            "base": None,
            "mixed": [loras[i] for i in job["owners"]],
            "one": [loras[0]] * len(self._prompts),
        }

    def run(self, which: str) -> dict[str, Any]:
        """All prompts at once."""
        started = time.perf_counter()
        outputs = self._llm.generate(self._prompts, self._params, use_tqdm=False, lora_request=self._loras[which])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}


def main() -> None:
    """Answer until stdin ends."""
    sys.path.remove(str(Path(__file__).parent))  # its modules are ours
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no answer

    def answer(make: Callable[[], dict[str, Any]]) -> bool:
        try:
            reply, fine = make(), True
        except Exception as error:  # noqa: BLE001  it is told to the benchmark
            reply, fine = {"error": f"{type(error).__name__}: {error}"}, False
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        return fine

    asked: list[Asked] = []

    def start() -> dict[str, Any]:
        asked.append(Asked(json.loads(sys.stdin.readline())))
        return {"version": asked[0].version, "enforce_eager": asked[0].enforce_eager}

    if answer(start):
        for line in sys.stdin:
            which = json.loads(line)["run"]
            answer(lambda which=which: asked[0].run(which))


if __name__ == "__main__":
    main()
