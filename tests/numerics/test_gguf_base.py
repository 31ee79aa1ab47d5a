"""A base from a GGUF file answers as its dequantised weights do, alone and under adapters of every kind of module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lora_runtime.batch import Row
from lora_runtime.model.load import load_base
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import Task, TokenSequence
from tests.gguf_files import CHAT_TEMPLATE, dequantised, packaged_smollm2, write_llama
from tests.oracle import TaskOracle, make_task_adapter

MAX_DIFFERENCE = 1e-4  # of any logit
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "linears": {"target_modules": LINEARS},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "output": {"target_modules": ["v_proj", "lm_head"]},
    "output-alone": {"target_modules": ["lm_head"]},
    "everything": {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
}
DORA: Mapping[str, Mapping[str, Any]] = {"dora": {"target_modules": LINEARS, "use_dora": True}}
TEXTS = (
    "short",
    "what time does the train to the coast leave tomorrow morning",
    "1234 naïve\n\n  prices<|im_end|>user",
)


@dataclass(frozen=True)
class Served:
    """A GGUF file, and the folder of the same weights that is the oracle's base."""

    path: Path
    folder: Path
    runtime: Runtime

    def answers(self, rows: list[Row]) -> list[torch.Tensor]:
        return self.runtime.engine.call(lambda: self.runtime.runner.run(rows))


@pytest.fixture(scope="module", params=["tied", "untied"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp(request.param)
    write_llama(root / "tiny.gguf", folder=root / "plain", tied=request.param == "tied")
    with Runtime(root / "tiny.gguf", RuntimeSettings(arena_bytes=16 << 20)) as runtime:
        yield Served(root / "tiny.gguf", root / "plain", runtime)


def check_against_peft(
    served: Served, tokenizer: Any, root: Path, alpha: int, adapters: Mapping[str, Mapping[str, Any]]
) -> None:
    """The base and all adapters in one mixed batch: every next-token logit is PEFT's."""
    sequences = [TokenSequence(tuple(tokenizer(text).input_ids), None) for text in TEXTS]
    rows = [Row(sequence, task=Task.GENERATE) for sequence in sequences]
    plain = TaskOracle(served.folder, None, "CAUSAL_LM")
    expected = [plain.answer(sequence) for sequence in sequences]
    for seed, (name, config) in enumerate(adapters.items()):
        options = {"r": 3 + seed, "lora_alpha": alpha, **config}
        folder = make_task_adapter(served.folder, root / name, "CAUSAL_LM", options, seed=seed)
        adapter = served.runtime.load(folder).id
        resident = served.runtime.engine.hold([adapter])[adapter]
        rows += [Row(sequence, resident, Task.GENERATE) for sequence in sequences]
        oracle = TaskOracle(served.folder, folder, "CAUSAL_LM")
        adapted = [oracle.answer(sequence) for sequence in sequences]
        assert min((a - b).abs().max() for a, b in zip(adapted, expected[: len(sequences)], strict=True)) > 1e-2, name
        expected += adapted
    names = [name for name in ("base", *adapters) for _ in sequences]
    for name, found, want in zip(names, served.answers(rows), expected, strict=True):
        assert found.shape == want.shape, name
        assert (found - want).abs().max() < MAX_DIFFERENCE, name


def test_every_logit_is_that_of_peft_on_the_dequantised_weights(served: Served, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(served.folder)
    check_against_peft(served, tokenizer, tmp_path, 8, {**ADAPTERS, **DORA})


def test_it_is_the_base_that_its_weights_make(served: Served) -> None:
    found, same = load_base(served.path, prepack=False), load_base(served.folder, prepack=False)
    assert found.spec.fingerprint == same.spec.fingerprint
    assert found.spec.tied_output is same.spec.tied_output
    assert found.spec.max_length == same.spec.max_length
    assert found.spec.name == "tiny.gguf"
    config: Any = found.backbone.inputs.module.config
    assert getattr(config, "quantization_config", None) is None
    assert {parameter.dtype for parameter in found.backbone.inputs.module.parameters()} == {torch.float32}


def test_its_tokenizer_is_the_files_own(served: Served) -> None:
    found = load_base(served.path, prepack=False).tokenizer
    same = transformers.AutoTokenizer.from_pretrained(served.folder)
    assert found.is_fast
    assert len(found) == len(same)
    assert found.chat_template == CHAT_TEMPLATE
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(found, token) == getattr(same, token) is not None
    for text in TEXTS:
        assert found(text).input_ids == same(text).input_ids
        assert found.decode(found(text).input_ids) == text
    turns = [{"role": "user", "content": "leave tomorrow"}]
    prompts = [t.apply_chat_template(turns, add_generation_prompt=True).input_ids for t in (found, same)]
    assert prompts[0] == prompts[1]
    assert found.eos_token_id in prompts[0]


@pytest.mark.slow
def test_a_packaged_language_model_is_served_as_transformers_and_peft_answer(tmp_path: Path) -> None:
    path = packaged_smollm2()
    folder = dequantised(path, tmp_path / "plain")
    with Runtime(path, RuntimeSettings(arena_bytes=256 << 20, prepack=False)) as runtime:
        tokenizer: Any = runtime.encoders.base._tokenizer
        assert tokenizer.is_fast
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", "<|im_end|>", 2)
        turns = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
        assert tokenizer.decode(prompt).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
        served = Served(path, folder, runtime)
        answer: list[int] = []
        while tokenizer.eos_token_id not in answer and len(answer) < 12:
            row = Row(TokenSequence((*prompt, *answer), None), task=Task.GENERATE)
            answer.append(int(served.answers([row])[0].argmax()))
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
        # 30 layers amplify rounding: under larger random deltas, or magnitudes, PEFT itself is that far from fp64
        check_against_peft(served, tokenizer, tmp_path, 1, ADAPTERS)
