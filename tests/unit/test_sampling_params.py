"""What parameters are refused, by field, and when generation ends."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_runtime.errors import InvalidRequest
from lora_runtime.sampling.finish import FinishReason, finish_after
from lora_runtime.sampling.params import SamplingParams

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -0.1}, "temperature", "0 (greedy) or from 0.001 to 100"),
    ({"temperature": 1e-9}, "temperature", "1e-09"),
    ({"temperature": 101}, "temperature", "101"),
    ({"temperature": math.nan}, "temperature", "nan is not a finite number"),
    ({"temperature": True}, "temperature", "True"),
    ({"top_k": -1}, "top_k", "-1 is not an integer from 0"),
    ({"top_k": 1.5}, "top_k", "1.5"),
    ({"top_p": 0.0}, "top_p", "above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p", "1.01"),
    ({"top_p": math.inf}, "top_p", "inf"),
    ({"min_p": -0.1}, "min_p", "from 0 to 1"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "from 0.01 to 100"),
    ({"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -math.inf}, "frequency_penalty", "not a finite number"),
    ({"seed": -1}, "seed", "-1"),
    ({"seed": 1 << 63}, "seed", "9223372036854775808"),
    ({"stop": ("",)}, "stop[0]", "has 0 characters"),
    ({"stop": ("a", "b" * 257)}, "stop[1]", "has 257 characters; it takes 1 to 256"),
    ({"stop": ("a",) * 17}, "stop", "has 17 entries, the limit is 16"),
    ({"stop_token_ids": (3, -1)}, "stop_token_ids[1]", "-1"),
    ({"stop_token_ids": (1,) * 65}, "stop_token_ids", "limit is 64"),
    ({"max_new_tokens": 0}, "max_new_tokens", "from 1"),
    ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens", "5 is above max_new_tokens, which is 4"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"n": 0}, "n", "from 1 to 128"),
    ({"n": None}, "n", "None"),
    ({"n": 2, "temperature": 0}, "n", "greedy"),
]


@pytest.mark.parametrize(("given", "field", "part"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_by_field(given: dict[str, Any], field: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**given)
    assert caught.value.field == f"sampling.{field}"
    assert part in caught.value.description


def test_the_ends_of_the_ranges_are_allowed() -> None:
    for temperature in (0, 1e-3, 100):
        SamplingParams(temperature=temperature)
    SamplingParams(top_k=0, top_p=1, min_p=1, repetition_penalty=0.01, presence_penalty=-2, frequency_penalty=2)
    SamplingParams(seed=(1 << 63) - 1, stop=("x" * 256,) * 16, logprobs=0, n=128, min_new_tokens=256)


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    params = SamplingParams(stop_token_ids=(1, 10))
    params.check_vocabulary(11)
    with pytest.raises(InvalidRequest, match=r"sampling.stop_token_ids\[1\]: 10 is not an integer from 0 to 9"):
        params.check_vocabulary(10)


def test_a_seed_is_drawn_once_and_kept() -> None:
    drawn = {SamplingParams().seeded().seed for _ in range(8)}
    assert len(drawn) == 8 and None not in drawn
    assert SamplingParams(seed=0).seeded().seed == 0


def test_a_sequence_ends_by_token_or_length() -> None:
    params = SamplingParams(stop_token_ids=(7,), max_new_tokens=3)
    assert finish_after(params, 5, 2, {2}) is None
    assert finish_after(params, 5, 3, {2}) is FinishReason.LENGTH
    assert finish_after(params, 2, 3, {2}) is FinishReason.EOS
    assert finish_after(params, 7, 1, {2}) is FinishReason.STOP_TOKEN
    ignoring = SamplingParams(ignore_eos=True, max_new_tokens=3)
    assert finish_after(ignoring, 2, 1, {2}) is None
    assert [reason for reason in FinishReason if reason.is_complete] == ["eos", "stop_token", "stop_string"]
