"""The sampler against transformers' own processors: what is kept, and with which probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lora_runtime.sampling import draw
from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.processors import process_logits
from lora_runtime.sampling.row import RowState
from lora_runtime.sampling.sampler import Sampler

VOCAB = 300
EOS = 2


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def one(logits: Tensor, params: SamplingParams, prompt: Sequence[int] = (), generated: Sequence[int] = ()) -> RowState:
    assert logits.ndim == 1
    return RowState(params.seeded(), prompt, generated=generated, eos_token_ids=[EOS])


def oracle(params: SamplingParams, prompt: list[int], generated: list[int], logits: Tensor) -> Tensor:
    """Log-probabilities that transformers' `generate` would sample from."""
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))]
    steps += [MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, EOS, device="cpu")]
    steps += [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    steps += [TopPLogitsWarper(params.top_p)] * (params.top_p < 1)
    steps.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([prompt + generated])
    return LogitsProcessorList(steps)(ids, logits[None].clone()).log_softmax(-1)[0]


def quantile_tokens(logits: Tensor, params: SamplingParams, row: RowState, us: Tensor) -> Tensor:
    """Tokens of the numbers `us`, through the same functions that a batch goes through."""
    processed = logits[None].clone()
    process_logits(processed, [row])
    scores = (processed / params.temperature).expand(len(us), -1).contiguous()
    full = [torch.full((len(us),), float(value), dtype=torch.float64) for value in (params.top_p, params.min_p)]
    weights = draw.integer_weights(scores)
    if not params.truncates:
        return draw.draw_from_all(weights, full[1], us)
    limits = draw.Limits(torch.full((len(us),), min(params.top_k, len(logits))), *full)
    return draw.draw_from_best(scores, weights, limits, us)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 100_000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5, "top_k": 20},
    {"min_new_tokens": 4},
    {"min_new_tokens": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_is_drawn_has_transformers_probabilities(settings: dict[str, Any]) -> None:
    """Evenly spaced numbers instead of random ones: shares are then within the spacing of the probabilities."""
    params = SamplingParams(seed=1, **settings)
    prompt, generated = [5, 6, 6, 290], [7, 8, 7]
    logits = normal(VOCAB)
    logits[[EOS, 7, 290]] = torch.tensor([9.0, 7.0, -1.0])
    expected = oracle(params, prompt, generated, logits)
    row = one(logits, params, prompt, generated)
    count = 1 << 13
    us = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.bincount(quantile_tokens(logits, params, row, us), minlength=VOCAB) / count
    assert (drawn[expected.isinf()] == 0).all()
    assert (drawn - expected.exp()).abs().max() < 1.01 / count


def test_frequency_and_presence_are_taken_from_generated_tokens() -> None:
    logits = normal(3, VOCAB)
    expected = logits.clone()
    expected[1, 7] -= 0.5 * 2 + 1.5
    expected[1, 8] -= 0.5 + 1.5
    expected[2, 9] += 1.0
    rows = [
        one(logits[0], SamplingParams(), [1], [7]),
        one(logits[1], SamplingParams(presence_penalty=1.5, frequency_penalty=0.5), [9, VOCAB + 3], [7, 8, 7]),
        one(logits[2], SamplingParams(frequency_penalty=-1.0), [7], [9]),
    ]
    process_logits(logits, rows)
    torch.testing.assert_close(logits, expected)


def test_min_new_tokens_forbids_stop_tokens_and_eos() -> None:
    logits = torch.zeros(1, 8)
    params = SamplingParams(temperature=0, min_new_tokens=2, stop_token_ids=(3, 900))
    row = one(logits[0], params)
    process_logits(logits, [row])
    assert logits[0].isinf().nonzero()[:, 0].tolist() == [EOS, 3]
    row.append(4)
    row.append(4)
    fresh = torch.zeros(1, 8)
    process_logits(fresh, [row])
    assert fresh.isfinite().all()


@pytest.mark.parametrize("vocab", [5, 64, 257, 5000])
@pytest.mark.parametrize("levels", [2, 50])
def test_ties_are_settled_as_by_a_full_sort(vocab: int, levels: int) -> None:
    """Few distinct logits: candidates end within a tie, so rows go on to more; the result is that of a whole sort."""
    rng = np.random.default_rng(vocab * levels)
    scores = torch.from_numpy(rng.integers(0, levels, (24, vocab)).astype(np.float32) / 4)
    scores[3, : vocab // 2] = -torch.inf
    limits = draw.Limits(
        torch.from_numpy(rng.integers(0, min(vocab, 40), 24)),
        torch.from_numpy(rng.uniform(0.2, 1, 24)),
        torch.from_numpy(rng.choice([0.0, 0.3], 24)),
    )
    us = torch.from_numpy(rng.uniform(0, 1, 24))
    drawn = draw.draw_from_best(scores, draw.integer_weights(scores), limits, us)
    for k in range(24):
        order = np.lexsort((np.arange(vocab), -scores[k].numpy())).tolist()  # by score, then by id
        values = scores[k].double()[order]
        top_k = int(limits.top_k[k])
        weights = draw.integer_weights(scores[k : k + 1])[0].double()[order]
        if top_k:
            weights[values < values[top_k - 1]] = 0
        reached = weights.cumsum(0) - weights >= limits.top_p[k] * weights.sum()
        weights[reached | (weights < limits.min_p[k] * weights[0])] = 0
        target = torch.floor(us[k] * weights.sum())
        assert int(drawn[k]) == order[int((weights.cumsum(0) > target).nonzero()[0])]


def test_greedy_takes_the_first_of_the_best_and_ignores_the_rest() -> None:
    logits = torch.tensor([[0.0, 4.0, 4.0, -torch.inf], [-torch.inf, -torch.inf, -torch.inf, -80.0]])
    row = one(logits[0], SamplingParams(temperature=0, top_k=3, top_p=0.5))
    assert [token.token_id for token in Sampler().sample(logits, [row, row])] == [1, 3]


def test_borders_are_exact() -> None:
    """Four equal tokens: a mass of exactly top_p is enough, and a number at a border takes the token after it."""
    us = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    scores = torch.zeros(5, 4)
    weights, ones, none = draw.integer_weights(scores), torch.ones_like(us), torch.zeros_like(us)
    assert draw.draw_from_all(weights, none, us).tolist() == [0, 1, 2, 3, 3]
    for top_k, top_p, expected in ((4, 1.0, [0, 1, 2, 3, 3]), (0, 0.5, [0, 0, 1, 1, 1]), (1, 0.75, [0, 0, 1, 2, 2])):
        limits = draw.Limits(torch.full((5,), top_k), ones * top_p, none)
        assert draw.draw_from_best(scores, weights, limits, us).tolist() == expected
