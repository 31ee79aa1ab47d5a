"""Adapters that others trained and published, on random bases of the shapes they were trained on.

They are looked for in `$MULTILORA_DATA/peft_adapters`; without it these tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_runtime.errors import AdapterRejected, BaseModelUnsupported
from tests.conformance.families import Family, build_base, byte_pairs
from tests.conformance.matrix_bench import Bench
from tests.oracle import TaskOracle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MULTILORA_DATA" not in os.environ, reason="MULTILORA_DATA names no folder of data"),
]

_WORDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
# folder → (base, task, labels)
ADAPTERS: dict[str, tuple[Family, str, int | None]] = {
    "gpt2-seqcls": (
        Family("GPT2LMHeadModel", {**_WORDS, "n_positions": 96}, (), (), "wte", byte_pairs, is_decoder=True),
        "SEQ_CLS",
        2,
    ),
    "gptneo-causal": (
        Family(
            "GPTNeoForCausalLM",
            {**_WORDS, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "window_size": 8,
             "attention_types": [[["global", "local"], 6]], "max_position_embeddings": 96},
            (), (), "wte", byte_pairs, is_decoder=True,
        ),
        "CAUSAL_LM",
        None,
    ),
    "neox-rank1-f16": (  # the feed-forward layers, which it does not adapt, are kept narrow
        Family(
            "GPTNeoXForCausalLM",
            {**_WORDS, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
             "intermediate_size": 64, "max_position_embeddings": 96},
            (), (), "embed_in", byte_pairs, is_decoder=True,
        ),
        "CAUSAL_LM",
        None,
    ),
    "privacyfilter-tokencls": (
        Family(
            "OpenAIPrivacyFilterForTokenClassification",
            {**_WORDS, "intermediate_size": 36, "num_local_experts": 4, "max_position_embeddings": 96,
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            (), (), "embed_tokens", byte_pairs, left_out=("score.",),
        ),
        "TOKEN_CLS",
        33,
    ),
}  # fmt: skip
MUST_BE_SERVED = {"gpt2-seqcls"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_published_adapter_is_served_exactly_or_refused(name: str, tmp_path: Path) -> None:
    family, task, num_labels = ADAPTERS[name]
    folder = Path(os.environ["MULTILORA_DATA"]) / "peft_adapters" / name
    base = build_base(name, tmp_path, family)
    oracle = TaskOracle(base.folder, folder, task, num_labels=num_labels, last_token=family.is_decoder)
    try:
        bench = Bench(base, tmp_path)
    except BaseModelUnsupported:
        if name in MUST_BE_SERVED:
            raise
        return
    try:
        group = bench.group_of(folder, name, task, oracle, base.sequences)
        groups = [group, bench.alone()]
        for each, outputs in zip(groups, bench.run(groups), strict=True):
            each.check(outputs)
    except AdapterRejected:
        if name in MUST_BE_SERVED:
            raise
    finally:
        bench.close()
