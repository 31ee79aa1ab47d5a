"""Generation as the tests ask for it, and transformers' own as the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_runtime.engine import Engine
from lora_runtime.generation import Delta, Generated, Generation, Sample
from lora_runtime.sampling.detokenize import Detokenizer, TokenText
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.types import DEFAULT_TENANT, AdapterId, Request, Result, Task, TokenSequence
from tests.oracle import train

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=20, logprobs=0)


def make_generator(base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """Save a random PEFT adapter of a decoder, its deltas large enough to change every text."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(str(base)), LoraConfig(task_type="CAUSAL_LM", **config)
        )
        train(adapted)
        adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return folder


@dataclass(frozen=True)
class Wanted:
    """What transformers generates: new tokens, the last perhaps an EOS, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


class GenerateOracle:
    """transformers' `generate` with one PEFT adapter at a time, greedy, one prompt at a time, fp32."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(str(base))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, folder in adapters.items():
                if isinstance(model, PeftModel):
                    model.load_adapter(str(folder), adapter_name=name)
                else:
                    model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        self.model: Any = model.eval()

    def generate(self, adapter: str | None, prompt: Sequence[int], max_new_tokens: int) -> Wanted:
        """`adapter` None is the base alone."""
        ids = torch.tensor([list(prompt)])
        options = dict(
            do_sample=False, max_new_tokens=max_new_tokens, return_dict_in_generate=True, output_logits=True,
            attention_mask=torch.ones_like(ids), pad_token_id=0,
        )  # fmt: skip
        with torch.inference_mode():
            if adapter is None and isinstance(self.model, PeftModel):
                with self.model.disable_adapter():
                    out = self.model.generate(input_ids=ids, **options)
            else:
                if adapter is not None:
                    self.model.set_adapter(adapter)
                out = self.model.generate(input_ids=ids, **options)
        tokens = out.sequences[0, len(prompt) :].tolist()
        scores = [torch.log_softmax(logits[0].float(), -1) for logits in out.logits]
        return Wanted(tokens, [float(row[token]) for row, token in zip(scores, tokens, strict=True)])


class Asking:
    """Generating requests of one engine."""

    def __init__(self, engine: Engine, base: Path, eos_token_ids: Sequence[int] = ()) -> None:
        self._engine = engine
        self._detokenizer = Detokenizer(AutoTokenizer.from_pretrained(str(base)).backend_tokenizer)
        self._eos = frozenset(eos_token_ids)
        self._count = 0
        self.deltas: dict[str, list[Delta]] = {}

    def submit(
        self,
        adapter: AdapterId,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams = GREEDY,
        *,
        tenant: str | None = None,
        **request: Any,
    ) -> tuple[str, Future[Result]]:
        """The request's name and its future."""
        self._count += 1
        name = f"g{self._count}"
        deltas = self.deltas[name] = []
        generation = Generation(params.seeded(), lambda: TokenText(self._detokenizer), self._eos, None, deltas.append)
        sequences = tuple(TokenSequence(tuple(prompt), None) for prompt in prompts)
        asked = Request(name, adapter, Task.GENERATE, sequences, tenant=tenant, generation=generation, **request)
        return name, self._engine.submit(asked)

    def ask(self, adapter: AdapterId, prompt: Sequence[int], params: SamplingParams = GREEDY, **more: Any) -> Sample:
        """The one sample of one prompt."""
        (sample,) = samples_of(self.submit(adapter, [prompt], params, **more)[1].result(60))
        return sample


def samples_of(result: Result, sequence: int = 0) -> tuple[Sample, ...]:
    """Of one of a result's sequences."""
    output = result.outputs[sequence]
    assert isinstance(output, Generated)
    return output.samples


def adapter_id(name: str) -> AdapterId:
    return AdapterId(DEFAULT_TENANT, name, 1)


def token_ids(sample: Sample) -> list[int]:
    return [token.token_id for token in sample.tokens if token.token_id is not None]
