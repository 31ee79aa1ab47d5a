"""Our engine, asked for greedy texts of a given length."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from lora_runtime.generation import Delta, Generated, Generation, Sample
from lora_runtime.runtime import Runtime
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.types import AdapterInfo, Request, Result, Task, TokenSequence
from server.bench.generate.checks import Step
from server.bench.generate.others import Prompts

_TIMEOUT_S = 600.0  # of one text; a benchmark that hangs is to end


@dataclass(slots=True)
class Watched:
    """When each token of one text came."""

    wanted: int = 1  # tokens, after which `reached` is set
    started: float = field(default_factory=time.perf_counter)
    stamps: list[float] = field(default_factory=list[float])
    reached: threading.Event = field(default_factory=threading.Event)

    def on_delta(self, delta: Delta) -> None:
        """In the engine's thread."""
        self.stamps += [time.perf_counter()] * len(delta.tokens)
        if len(self.stamps) >= self.wanted:
            self.reached.set()

    def wait(self) -> None:
        """Until `wanted` tokens came."""
        if not self.reached.wait(_TIMEOUT_S):
            raise TimeoutError(f"{self.wanted} tokens did not come within {_TIMEOUT_S:.0f} s")

    @property
    def first_token_s(self) -> float:
        return self.stamps[0] - self.started

    @property
    def gaps_s(self) -> list[float]:
        """Between a token and the next."""
        return [b - a for a, b in itertools.pairwise(self.stamps)]


class OwnEngine:
    """Requests of one runtime. EOS ends no text."""

    def __init__(self, runtime: Runtime, new_tokens: int) -> None:
        self._runtime = runtime
        self._new_tokens = new_tokens
        self._numbers = itertools.count(1)

    def submit(
        self,
        info: AdapterInfo,
        prompt: tuple[int, ...],
        *,
        num_tokens: int | None = None,
        logprobs: int | None = None,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> Future[Result]:
        """One text, of `num_tokens` where they are given."""
        params = SamplingParams(
            temperature=0.0, max_new_tokens=num_tokens or self._new_tokens, ignore_eos=True, logprobs=logprobs
        )
        text = self._runtime.generation_for(info)
        generation = Generation(params.seeded(), text.new_text, text.eos_token_ids, on_delta=on_delta)
        sequences = (TokenSequence(prompt, None),)
        request = Request(f"bench-{next(self._numbers)}", info.id, Task.GENERATE, sequences, generation=generation)
        return self._runtime.engine.submit(request)

    def generate(self, infos: Sequence[AdapterInfo], prompts: Prompts, logprobs: int | None = None) -> list[Sample]:
        """All at once, each its own request."""
        asked = [self.submit(info, prompt, logprobs=logprobs) for info, prompt in zip(infos, prompts, strict=True)]
        return [sample_of(future) for future in asked]

    def watch(self, info: AdapterInfo, prompt: tuple[int, ...], wanted: int = 1) -> tuple[Watched, Future[Result]]:
        """A text whose tokens are timed; its clock starts now."""
        watched = Watched(wanted)
        return watched, self.submit(info, prompt, on_delta=watched.on_delta)

    def ms_per_token(self, info: AdapterInfo, prompt: tuple[int, ...]) -> float:
        """Of one text alone, from its first token to its last."""
        watched, future = self.watch(info, prompt)
        sample_of(future)
        return 1e3 * (watched.stamps[-1] - watched.stamps[0]) / (len(watched.stamps) - 1)


def sample_of(future: Future[Result]) -> Sample:
    """The one sample of a request with one prompt."""
    (output,) = future.result(_TIMEOUT_S).outputs
    assert isinstance(output, Generated)
    return output.samples[0]


def tokens_of(sample: Sample) -> list[int]:
    return [token.token_id for token in sample.tokens if token.token_id is not None]


def steps_of(sample: Sample) -> list[Step]:
    """Of a sample that was asked for the two best log-probabilities, whose difference is that of the logits."""
    steps: list[Step] = []
    for token in sample.tokens:
        assert token.token_id is not None
        first, second = token.top_logprobs
        other = second if token.token_id == first.token_id else first
        steps.append(Step(token.token_id, other.token_id, first.logprob - second.logprob))
    return steps
