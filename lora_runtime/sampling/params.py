"""What a caller may ask of generation, and what is refused. No torch here."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_runtime.errors import InvalidRequest

MIN_TEMPERATURE = 1e-3  # below it a division in fp32 may overflow; 0 is greedy
MAX_TEMPERATURE = 100.0
MAX_PENALTY_RATIO = 100.0  # of the repetition penalty, and one by it the least
MAX_LOGPROBS = 20  # as OpenAI's top_logprobs
MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_NEW_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
SEED_BITS = 63

_INTEGERS = {
    "top_k": (0, MAX_TOKEN_ID),
    "seed": (0, (1 << SEED_BITS) - 1),
    "min_new_tokens": (0, MAX_NEW_TOKENS),
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "logprobs": (0, MAX_LOGPROBS),
    "n": (1, MAX_SAMPLES),
}
_OPTIONAL = frozenset({"seed", "logprobs"})
_NUMBERS = {
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1 / MAX_PENALTY_RATIO, MAX_PENALTY_RATIO),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn and when generation ends. Raises InvalidRequest on fields `sampling.*` when made.

    The order of steps and their meaning are those of transformers' `GenerationMixin._get_logits_processor`: penalties,
    `min_new_tokens`, temperature, top-k, top-p, min-p.
    """

    temperature: float = 1.0  # logits are divided by it; 0 takes the best token (greedy)
    top_k: int = 0  # keep the k best tokens and those that equal the k-th; 0 is off
    top_p: float = 1.0  # keep the fewest best tokens whose mass reaches it (Holtzman et al. 2019); 1 is off
    min_p: float = 0.0  # drop tokens below min_p times the best one's probability (Nguyen et al. 2024); 0 is off
    repetition_penalty: float = 1.0  # over prompt and generated tokens (Keskar et al. 2019, transformers); 1 is off
    presence_penalty: float = 0.0  # taken once from the logit of each generated token (OpenAI); 0 is off
    frequency_penalty: float = 0.0  # taken as often as the token was generated (OpenAI); 0 is off
    seed: int | None = None  # same seed, same tokens; None draws one at admission (`seeded`)
    stop: tuple[str, ...] = ()  # texts that end generation
    include_stop: bool = False  # whether the stop string stays at the text's end
    stop_token_ids: tuple[int, ...] = ()  # tokens that end generation, besides the model's EOS
    min_new_tokens: int = 0  # EOS and stop tokens cannot be drawn before that many tokens
    max_new_tokens: int = 256
    logprobs: int | None = (
        None  # number of best alternatives told per token; 0 tells the chosen one's alone; None is off
    )
    n: int = 1  # independent samples of one prompt
    ignore_eos: bool = False  # EOS does not end generation and is not masked by min_new_tokens

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL):
                _check_integer(name, value, low, high)
        for name, (low, high) in _NUMBERS.items():
            _check_number(name, getattr(self, name), f"from {low:g} to {high:g}", low, high)
        if _number("temperature", self.temperature) != 0:
            allowed = f"0 (greedy) or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
            _check_number("temperature", self.temperature, allowed, MIN_TEMPERATURE, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, "above 0 and at most 1", math.nextafter(0.0, 1.0), 1.0)
        self._check_stops()
        self._check_together()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leave out tokens."""
        return self.top_k > 0 or self.top_p < 1

    def seeded(self) -> SamplingParams:
        """Itself, with a random seed where it has none: what admission keeps and reports."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(SEED_BITS))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest when a stop token is not below `vocab_size`."""
        for index, token in enumerate(self.stop_token_ids):
            _check_integer(f"stop_token_ids[{index}]", token, 0, vocab_size - 1)

    def _check_stops(self) -> None:
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        for index, text in enumerate(self.stop):
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                problem = f"has {len(text)} characters; it takes 1 to {MAX_STOP_CHARS}"
                raise InvalidRequest(f"sampling.stop[{index}]", problem)
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        self.check_vocabulary(MAX_TOKEN_ID + 1)

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            problem = f"{self.min_new_tokens} is above max_new_tokens, which is {self.max_new_tokens}"
            raise InvalidRequest("sampling.min_new_tokens", problem)
        if self.n > 1 and self.is_greedy:
            raise InvalidRequest(
                "sampling.n", f"{self.n} greedy samples would be the same; set a temperature or n to 1"
            )


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"sampling.{name}", f"{value!r} is not an integer from {low} to {high}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"sampling.{name}", f"{value!r} is not a finite number")
    return value


def _check_number(name: str, value: Any, allowed: str, low: float, high: float) -> None:
    if not low <= _number(name, value) <= high:
        raise InvalidRequest(f"sampling.{name}", f"{value!r} is not allowed; it is {allowed}")


def _check_count(name: str, values: Sequence[Any], most: int) -> None:
    if len(values) > most:
        raise InvalidRequest(f"sampling.{name}", f"has {len(values)} entries, the limit is {most}")
