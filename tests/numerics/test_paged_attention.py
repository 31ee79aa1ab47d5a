"""Our attention over blocks, in Triton, equals plain causal attention over the whole sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_runtime.kernels import paged_attention as kernels
from lora_runtime.kernels.paged_attention import paged_attention
from lora_runtime.kv_blocks import KvConfig
from lora_runtime.model import kv_cache
from lora_runtime.model.kv_cache import KvCache, KvLayout
from lora_runtime.model.kv_layouts import SequenceSpan
from tests.numerics.test_kv_cache import Heads, Rule, World, fill_with_nan

ON_CPU = ("cpu", torch.float32)
PLACES = [
    ON_CPU,
    *(pytest.param(("cuda", t), marks=pytest.mark.gpu) for t in (torch.float32, torch.float16, torch.bfloat16)),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # relative Frobenius
RULES = [Rule(), Rule(window=3), Rule(window=70, scale=0.3), Rule(softcap=0.5), Rule(window=40, softcap=5.0)]
LENGTHS = [150, 9, 70, 1]
CHUNKS = {
    "texts that go on": [(which, length - 1, length) for which, length in enumerate(LENGTHS)],
    "all at once": [(0, 149, 150), (1, 0, 9), (2, 60, 70), (3, 0, 1)],
}
Place = tuple[str, torch.dtype]


class OwnWorld(World):
    """The world at a place, with our kernel for every rule."""

    def __init__(self, place: Place, heads: Heads, block_tokens: int) -> None:
        super().__init__(LENGTHS, heads, block_tokens, seed=1)
        device, dtype = torch.device(place[0]), place[1]
        config = KvConfig(2, heads.kv, heads.width, dtype.itemsize)
        options = {"layout": KvLayout.ROWS, "paged_attention": paged_attention}
        self.cache = KvCache(config, self.cache.num_blocks, block_tokens, dtype, device, **options)
        fill_with_nan(self.cache)
        self.q, self.k, self.v = ([t.to(device, dtype) for t in of_all] for of_all in (self.q, self.k, self.v))
        for which, length in enumerate(LENGTHS):
            slots = [self.blocks[which][at // block_tokens] * block_tokens + at % block_tokens for at in range(length)]
            for layer in range(2):
                self.cache.write(layer, self.k[which][layer], self.v[which][layer], torch.tensor(slots, device=device))

    def error(self, chunks: list[tuple[int, int, int]], rule: Rule) -> float:
        found = self.attend(chunks, rule).double().cpu()
        self.q, self.k, self.v = ([t.double().cpu() for t in of_all] for of_all in (self.q, self.k, self.v))
        wanted = self.wanted(chunks, rule)
        return float((found - wanted).norm() / wanted.norm())


@pytest.fixture(autouse=True)
def own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "own_paged_attention", lambda *_: paged_attention)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_is_causal_attention(place: Place, chunks: str, rule: Rule) -> None:
    assert OwnWorld(place, Heads(4, 2, 16), 16).error(CHUNKS[chunks], rule) <= TOLERANCE[place[1]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("heads", "block_tokens"), [(Heads(3, 3, 8), 4), (Heads(7, 1, 20), 64), (Heads(4, 1, 64), 16)], ids=str
)
def test_any_heads_and_blocks(place: Place, heads: Heads, block_tokens: int) -> None:
    assert OwnWorld(place, heads, block_tokens).error(CHUNKS["all at once"], RULES[2]) <= TOLERANCE[place[1]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("most", [1, 2, 4])
def test_keys_that_are_split_are_joined(place: Place, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def splits(_programs: int, _max_k: int) -> int:
        asked.append(most)
        return most

    monkeypatch.setattr(kernels, "_splits", splits)
    for rule in (Rule(), Rule(window=20, softcap=2.0)):
        error = OwnWorld(place, Heads(2, 1, 16), 16).error(CHUNKS["texts that go on"], rule)
        assert error <= TOLERANCE[place[1]]
    assert asked == [most] * 4


def test_a_wrong_mask_is_noticed() -> None:
    world = OwnWorld(ON_CPU, Heads(2, 1, 16), 16)
    chunks = CHUNKS["texts that go on"]
    found = world.attend(chunks, Rule(window=69))
    wanted = world.wanted(chunks, Rule(window=70))
    assert (found - wanted).norm() / wanted.norm() > 100 * TOLERANCE[torch.float32]


@pytest.mark.gpu
def test_a_captured_call_serves_other_sequences() -> None:
    world = OwnWorld(("cuda", torch.bfloat16), Heads(8, 2, 64), 64)
    cache = world.cache
    device = cache.device

    def spans(of: list[int]) -> list[SequenceSpan]:
        return [SequenceSpan(1, LENGTHS[which], world.blocks[which]) for which in of]

    static = cache.metadata(spans([0, 2])).paged()
    q = torch.stack([world.q[which][0, -1] for which in (0, 2)])
    scoring = kv_cache.Scoring(64**-0.5)
    cache.attend_paged(0, q, static, scoring)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend_paged(0, q, static, scoring)
    other = cache.metadata(spans([3, 1])).paged()
    static.used.copy_(other.used)
    static.blocks.zero_()
    static.blocks[:, : other.blocks.shape[1]] = other.blocks
    q.copy_(torch.stack([world.q[which][0, -1] for which in (3, 1)]))
    out.fill_(float("nan"))
    graph.replay()
    want = cache.attend_paged(0, q, replace(other, queries=torch.arange(3, dtype=torch.int32, device=device)), scoring)
    torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
