"""Draws are reproducible, independent of the batch, and follow the distribution."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from lora_runtime.sampling.params import SamplingParams
from lora_runtime.sampling.row import Bitmask, RowState
from lora_runtime.sampling.sampler import Sampler
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.sampling.uniform import sample_seed, uniforms

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_p": 0.9, "temperature": 4.0},
    {"top_k": 5},
    {"top_k": 900},
    {"min_p": 0.1, "logprobs": 3},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 0},
    {"presence_penalty": 1.0, "min_new_tokens": 4, "top_k": 30, "logprobs": 20},
]


class Only:
    """A mask of a few tokens that records what it accepts."""

    def __init__(self, *tokens: int, vocab: int = 64) -> None:
        bits = np.zeros(vocab, np.uint8)
        bits[list(tokens)] = 1
        self._bits: Bitmask = np.packbits(bits, bitorder="little")
        self.accepted: list[int] = []

    def allowed(self) -> Bitmask:
        return self._bits

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def generate(places: list[int], logits: Tensor, sizes: list[int], num_steps: int) -> dict[int, list[SampledToken]]:
    """Run the sequences `places` in batches of the given sizes, in that order."""
    rows = {
        place: RowState(SamplingParams(seed=place, **KINDS[place % len(KINDS)]), [1, place], eos_token_ids=[2])
        for place in places
    }
    results: dict[int, list[SampledToken]] = {place: [] for place in places}
    for step in range(num_steps):
        start = 0
        for size in sizes:
            part = places[start : start + size]
            start += size
            batch = Sampler().sample(logits[step, part], [rows[place] for place in part])
            for place, token in zip(part, batch, strict=True):
                assert token.token_id is not None
                rows[place].append(token.token_id)
                results[place].append(token)
    return results


@pytest.mark.parametrize("vocab", [4099, 49152])
def test_a_sequence_is_the_same_bit_for_bit_in_any_batch(vocab: int) -> None:
    places = list(range(18))
    logits = normal(3, 18, vocab)
    logits[:, :, 5:80] = logits[:, :, 5:6]  # ties
    together = generate(places, logits, [18], 3)
    alone = generate(places, logits, [1] * 18, 3)
    mixed = random.Random(3).sample(places, 18)
    assert together == alone == generate(mixed, logits, [7, 2, 9], 3)
    assert len({token.token_id for tokens in together.values() for token in tokens}) > 20


def test_another_seed_gives_other_tokens_and_a_sample_has_its_own() -> None:
    logits = normal(1, 5000).expand(40, -1).contiguous() / 9
    params = [SamplingParams(seed=seed) for seed in range(20)]
    rows = [RowState(p, []) for p in params] + [RowState(params[0], [], sample_index=k) for k in range(20)]
    tokens = [token.token_id for token in Sampler().sample(logits, rows)]
    assert len(set(tokens[:20])) > 15 and len(set(tokens[20:])) > 15
    assert tokens[0] == tokens[20]
    assert len({sample_seed(5, k) for k in range(1000)}) == 1000 and all(sample_seed(5, k) < 1 << 63 for k in range(99))


def test_a_sequence_that_is_built_anew_from_its_tokens_goes_on_alike() -> None:
    params = SamplingParams(seed=9, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.3)
    logits = normal(700, 1, 900)
    row, tokens = RowState(params, [3, 4]), []
    for step in range(700):
        if step in (1, 350):
            row = RowState(params, [3, 4], generated=tokens)
        token = Sampler().sample(logits[step], [row])[0].token_id
        assert token is not None
        row.append(token)
        tokens.append(token)
    straight, again = RowState(params, [3, 4]), []
    for step in range(700):
        token = Sampler().sample(logits[step], [straight])[0].token_id
        assert token is not None
        straight.append(token)
        again.append(token)
    assert tokens == again
    ids, counts = straight.seen
    assert {t: c for t, c in zip(ids.tolist(), counts.tolist(), strict=True) if c} == {
        t: tokens.count(t) for t in set(tokens)
    }


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 6, "min_p": 0.05, "temperature": 1.5}], ids=str)
def test_tokens_follow_the_distribution(settings: dict[str, Any]) -> None:
    num_draws = 20_000
    logits = normal(12, seed=4) / 2
    rows = [RowState(SamplingParams(seed=seed, **settings), []) for seed in range(num_draws)]
    batch = logits.expand(num_draws, -1).contiguous()
    drawn = np.bincount([t.token_id or 0 for t in Sampler().sample(batch, rows)], minlength=12)
    expected = kept_probabilities(logits, SamplingParams(**settings))
    assert (drawn[expected == 0] == 0).all()
    assert chisquare(drawn[expected > 0], num_draws * expected[expected > 0]).pvalue > 0.01


def kept_probabilities(logits: Tensor, params: SamplingParams) -> np.ndarray[Any, Any]:
    p = (logits.double() / params.temperature).softmax(0).numpy()
    order = np.argsort(-p)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    p[order[np.cumsum(p[order]) - p[order] >= params.top_p]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def test_the_numbers_of_seeds_and_steps_are_uniform_and_unlike() -> None:
    for seeds, steps in ((np.arange(20_000), np.zeros(20_000)), (np.full(20_000, 7), np.arange(20_000))):
        numbers = uniforms(seeds.astype(np.uint64), steps.astype(np.uint64))
        assert kstest(numbers, "uniform").pvalue > 0.01
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
        assert len(np.unique(numbers)) == 20_000


def test_logprobs_are_the_models_own_before_penalties_and_temperature() -> None:
    logits = normal(3, 64)
    logits[1, 10:30] = 20.0  # ties at the border of the best
    settings: dict[str, Any] = {"temperature": 0.2, "repetition_penalty": 2.0, "seed": 3}
    rows = [RowState(SamplingParams(logprobs=k, **settings), [4, 5]) for k in (2, 5, None)]
    before = logits.clone()
    results = Sampler().sample(logits, rows)
    assert torch.equal(logits, before)
    expected = logits.double().log_softmax(-1)
    for row, result, count in zip(expected, results, (2, 5), strict=False):
        assert result.token_id is not None
        assert result.logprob == pytest.approx(float(row[result.token_id]), rel=1e-5)
        best = sorted(range(64), key=lambda token, row=row: (-float(row[token]), token))[:count]
        assert [top.token_id for top in result.top_logprobs] == best
        assert [top.logprob for top in result.top_logprobs] == pytest.approx(row[best].tolist(), rel=1e-5)
    assert results[2].logprob is None and results[2].top_logprobs == ()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 4, "logprobs": 2}, {"top_p": 0.9}], ids=str)
def test_a_row_without_a_possible_token_is_told_and_harms_no_other(settings: dict[str, Any]) -> None:
    logits = normal(6, 500)
    logits[1, 7] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    rows = [RowState(SamplingParams(seed=1, **settings), []) for _ in range(6)]
    rows[4].mask = Only(vocab=64)
    results = Sampler().sample(logits, rows)
    assert [token.token_id is None for token in results] == [False, True, True, True, True, False]
    assert results[0] == Sampler().sample(logits[:1], rows[:1])[0]


def test_a_mask_allows_its_tokens_alone_and_is_told_what_was_drawn() -> None:
    logits = normal(4, 100)
    logits[:, 90] = 99.0
    mask = Only(3, 63)
    rows = [RowState(SamplingParams(seed=k, top_k=8), [], mask=mask if k % 2 else None) for k in range(4)]
    tokens = [token.token_id for token in Sampler().sample(logits, rows)]
    assert tokens[0] == tokens[2] == 90
    assert {tokens[1], tokens[3]} <= {3, 63}
    rows[1].append(63)
    replayed = Only(3, 63)
    RowState(SamplingParams(seed=1), [], mask=replayed, generated=[63, 3])
    assert (mask.accepted, replayed.accepted) == ([63], [63, 3])


def test_no_rows_give_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, 9), []) == []
