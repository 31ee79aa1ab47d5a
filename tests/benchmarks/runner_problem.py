"""A whole runner on a base of random weights, with random adapters in its arena."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Resident, Row
from lora_runtime.kernels.grouped_lora.registry import BackendResources, backend_for_base
from lora_runtime.kernels.grouped_lora.triton_backend.capturable import CapturableLora
from lora_runtime.model.base import PackedBackbone
from lora_runtime.model.buckets import GraphSettings
from lora_runtime.model.capture import CudaCapture
from lora_runtime.model.graphs import GraphedBackbone
from lora_runtime.model.load import load_base
from lora_runtime.model.runner import PackedRunner
from lora_runtime.types import Task, TokenSequence
from server.bench.texts import default_base
from tests.resident_adapters import image_elements, put_random_adapter

RANK = 16
ROW_TOKENS = 32
_GRAPH_BYTES = 8 << 30
_STACK_BYTES = 32 << 20
_SPREAD = 0.02  # of weights, as most checkpoints are initialised


@dataclass(frozen=True, slots=True)
class BaseShape:
    """An architecture with random weights; adapters are at its query and value projections, or the like."""

    make: Callable[[int], PreTrainedModel]  # of a vocabulary
    targets: tuple[str, ...]


def _bert(width: int, layers: int, heads: int) -> Callable[[int], PreTrainedModel]:
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return lambda vocab: BertModel(
        BertConfig(vocab_size=vocab, intermediate_size=4 * width, max_position_embeddings=128, **sizes)
    )


def _gpt2(vocab: int) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=128, pad_token_id=0))


def _llama(width: int, inner: int, layers: int, kv_heads: int) -> Callable[[int], PreTrainedModel]:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": kv_heads}
    return lambda vocab: LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab, max_position_embeddings=128, tie_word_embeddings=True, **sizes, **heads)
    )


SHAPES = {
    "tiny": BaseShape(_bert(64, 2, 4), ("query", "value")),
    "minilm": BaseShape(_bert(384, 6, 12), ("query", "value")),
    "bert": BaseShape(_bert(768, 12, 12), ("query", "value")),
    "gpt2": BaseShape(_gpt2, ("attn.c_attn",)),
    "llama-1b": BaseShape(_llama(2048, 8192, 16, 8), ("q_proj", "v_proj")),
    "llama-7b": BaseShape(_llama(4096, 11008, 32, 32), ("q_proj", "v_proj")),
}


@dataclass(frozen=True, slots=True)
class RunnerProblem:
    """Runners over one base and arena by how they run, and the adapters that are resident."""

    runners: dict[str, PackedRunner]  # "eager", and on CUDA "graph"
    adapters: tuple[Resident, ...]
    backend: str

    @classmethod
    def make(cls, shape: BaseShape, device: str, dtype: str, num_adapters: int, tokens: Sequence[int]) -> RunnerProblem:
        """`tokens` of the batches to come, which graphs are captured for."""
        with tempfile.TemporaryDirectory() as folder:
            _save(shape, folder, dtype)
            base = load_base(folder, device=device, dtype=dtype)
        place = base.placement
        spec = backend_for_base(place.device, place.dtype)
        sites = {site.index for site in base.spec.sites if site.name.endswith(shape.targets) and not site.per_sequence}
        elements = image_elements(base.spec, RANK, sites) + 1024
        arena = RankArena(num_adapters * elements * place.dtype.itemsize, place.dtype, place.device)
        slots = SlotTable(len(base.spec.sites), base.spec.groups, num_adapters, spec.a_layout)
        lora = spec.make(BackendResources(arena, slots, place.dtype, _STACK_BYTES))
        generator = torch.Generator().manual_seed(0)
        adapters = tuple(
            put_random_adapter(base.spec, arena, slots, RANK, sites, generator, scale=0.1) for _ in range(num_adapters)
        )
        runners = {"eager": PackedRunner(base, slots, lora)}
        if place.device.type == "cuda" and isinstance(base.backbone, PackedBackbone):
            assert isinstance(lora, CapturableLora), spec.name
            settings = GraphSettings(_GRAPH_BYTES, tuple(sorted(tokens)), max(tokens) // ROW_TOKENS, ROW_TOKENS)
            graphs = GraphedBackbone(base.backbone, lora, slots, CudaCapture(place.device), settings)
            runners["graph"] = PackedRunner(replace(base, backbone=graphs), slots, lora)
        for runner in runners.values():
            runner.warm_up()
        return cls(runners, adapters, spec.name)

    def rows(self, num_tokens: int, adapters: Sequence[Resident] | None) -> list[Row]:
        """Texts to be embedded, given to these adapters in turn, those of one adjacent; None: to the base."""
        generator = torch.Generator().manual_seed(num_tokens)
        ids = torch.randint(1000, 30_000, (num_tokens // ROW_TOKENS, ROW_TOKENS), generator=generator).tolist()
        sequences = [TokenSequence(tuple(of_row), None) for of_row in ids]
        if adapters is None:
            return [Row(sequence, task=Task.EMBED) for sequence in sequences]
        owners = sorted(i % len(adapters) for i in range(len(sequences)))
        return [Row(sequence, adapters[i], Task.EMBED) for sequence, i in zip(sequences, owners, strict=True)]


def _save(shape: BaseShape, folder: str, dtype: str) -> None:
    """In the base's dtype; matrices as wide as they come from training, not as BERT's are at the start."""
    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(default_base())
    model = shape.make(len(tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=max(_SPREAD, 0.5 * parameter.shape[-1] ** -0.5))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
