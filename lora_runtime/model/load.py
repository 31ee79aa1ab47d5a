"""Loading a base: sites and heads found by observation, its forward proved before anything is served."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

from lora_runtime.adapters.base_spec import Array, BaseSpec, LeafKind
from lora_runtime.adapters.fingerprint import fingerprint_base
from lora_runtime.adapters.metadata import BaseFingerprint
from lora_runtime.adapters.tokenizer import tokenizer_digest
from lora_runtime.errors import BaseModelUnsupported, first_line
from lora_runtime.heads import PooledHead, TaskHead
from lora_runtime.heads.sequence_leaf import is_leaf
from lora_runtime.kv_blocks import KvConfig
from lora_runtime.model.base import Backbone, BaseModel, PackedBackbone, PaddedBackbone
from lora_runtime.model.checkpoint import Source, read_checkpoint, resolve_source
from lora_runtime.model.fuse import fuse_linears, unfuse_linears
from lora_runtime.model.inject import make_leaves, make_sites, shared_modules, wrap_leaves
from lora_runtime.model.observe import Observed, observe
from lora_runtime.model.placement import Placement, place_modules, resolve_placement
from lora_runtime.model.prepack import prepack_linears, prepack_output
from lora_runtime.model.probe import (
    SeparateOutputs,
    check_moved,
    num_positions,
    probe_batch,
    prove_backbone,
    prove_head,
    separate_outputs,
)
from lora_runtime.model.prove_paged import prove_paged
from lora_runtime.model.quantize import Quantization, check_quantization, quantize_linears
from lora_runtime.model.skeleton import AUTO_CLASSES, Skeleton, build_skeleton, has_class, is_decoder
from lora_runtime.types import Pooling, Site, SiteGroup, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Looked:
    """The base as it is before anything is changed."""

    backbone: nn.Module
    config: Any
    decoder: bool
    fingerprint: BaseFingerprint
    modules: frozenset[str]
    parameters: dict[str, Array]
    skeletons: list[Skeleton]
    drawn: dict[Task, dict[str, torch.Tensor]]  # what adapters will bring, at random for the proof
    unserved: dict[Task, str]
    observed: dict[str, Observed]
    unrun: dict[str, nn.Module]  # leaves that the plain backbone has and no task class does: a pooler
    expected: SeparateOutputs
    word_embedding: str


def load_base(
    name_or_path: str | Path,
    *,
    prepack: bool = True,
    quantize: str = "none",
    device: str = "cpu",
    dtype: str = "float32",
    gguf_file: str | None = None,
) -> BaseModel:
    """Load an encoder or a decoder by hub name or path, prove it in fp32 on the CPU, and move it to its place.

    `prepack`: keep reordered copies of its projections, which are faster and take as much memory again; for fp32 on
    the CPU alone. `quantize`: one of `Quantization`; quantised projections are not prepacked. The base is proved before
    it is quantised. `device`: cpu, cuda or cuda:N. `dtype`: float32, bfloat16 or float16. `gguf_file`: the name of a
    GGUF file in the folder or repository, whose weights become fp32; a path to one needs no name beside it.

    Raises BaseModelUnsupported when it cannot be loaded, when sequences run together are not exact, or when the device
    is not to be had. A task whose head is not exact is left out, with the reason in `BaseSpec.unserved`.
    """
    source = resolve_source(name_or_path, gguf_file)
    placement = resolve_placement(device, dtype)
    quantization = check_quantization(quantize, placement.device, placement.dtype)
    try:
        return _load(source, prepack and placement.is_proved, quantization, placement)
    except BaseModelUnsupported:
        raise
    except Exception as error:  # the code of some two hundred architectures, not made for what is asked of it here
        message = f"base {source.name}: its architecture cannot be run here ({first_line(error)})"
        raise BaseModelUnsupported(message, base=source.name) from error


def _load(source: Source, prepack: bool, quantization: Quantization, placement: Placement) -> BaseModel:
    name, checkpoint = source.name, read_checkpoint(source)
    looked = _look(checkpoint.model, set(checkpoint.missing))
    heads = _make_heads(looked)
    linears = {path: linear for head in heads.values() for path, linear in head.sequence_linears.items()}
    sites, groups = make_sites(looked.observed, linears)
    for head in heads.values():
        head.set_sites(sites, groups)
    wrap_leaves(looked.backbone, looked.observed, sites, groups)
    if prepack and quantization is Quantization.NONE:
        num_bytes = _prepack(looked.backbone)
        if (generating := heads.get(Task.GENERATE)) is not None:
            generating.prepack_output(prepack_output)
        logger.info("base %s: %.0f MiB of reordered copies of its projections", name, num_bytes / (1 << 20))
    pack = not any(looked.observed[path].kind is LeafKind.LINEAR for path in shared_modules(looked.observed))
    backbone = prove_backbone(looked.backbone, looked.config, groups, looked.expected, name, pack=pack)
    kv, cannot_continue = _prove_paged(backbone, looked, groups, heads)
    _prove_heads(heads, looked, groups, name)
    pooled = PooledHead(Pooling.LAST if looked.decoder else Pooling.MEAN)
    all_heads: dict[Task, TaskHead | PooledHead] = {**heads, Task.EMBED: pooled}
    spec = _make_spec(
        name, looked, backbone, all_heads, linears, sites, groups, checkpoint.tokenizer
    )  # of the host's weights
    if not placement.is_proved:
        place_modules([looked.backbone, *(head.module for head in heads.values())], placement)
        backbone = replace(backbone, inputs=replace(backbone.inputs, device=placement.device))
        check = partial(check_moved, backbone, groups, looked.expected, placement, name)
        fuse = quantization is Quantization.NONE and placement.device.type == "cuda"
        _check_placed(check, looked.backbone, fuse=fuse)
    if quantization is not Quantization.NONE:
        outside = {path: value for path, value in spec.parameters.items() if path not in looked.parameters}
        quantized = quantize_linears(looked.backbone, quantization, looked.parameters)
        spec = replace(spec, parameters=quantized | outside)
    if kv is not None:
        kv = replace(kv, itemsize=placement.dtype.itemsize)
    else:
        logger.info("base %s: generates no text: %s", name, cannot_continue)
    configs = checkpoint.model.config, getattr(checkpoint.model, "generation_config", None)
    return BaseModel(spec, backbone, all_heads, checkpoint.tokenizer, placement, kv, cannot_continue, *configs)


def _prove_paged(
    backbone: Backbone, looked: _Looked, groups: tuple[SiteGroup, ...], heads: dict[Task, TaskHead]
) -> tuple[KvConfig | None, str]:
    """The shape of the keys and values of a base that generates, or why it does not."""
    if Task.GENERATE not in heads:
        return None, looked.unserved.get(Task.GENERATE, "the base has no output layer")
    if not isinstance(backbone, PackedBackbone):
        return None, "its attention is its own, which keeps no keys and values here"
    try:
        return prove_paged(backbone, groups, looked.expected), ""
    except BaseModelUnsupported as error:
        return None, error.message


def _prepack(backbone: nn.Module) -> int:
    """Those of a group as one product, unless the architecture cannot take its slices; the bytes of the copies."""
    with torch.inference_mode():
        num_bytes = prepack_linears(backbone)
        try:
            backbone(**probe_batch(backbone))
        except RuntimeError as error:
            logger.debug("projections are multiplied one by one: %s", error)
            num_bytes = prepack_linears(backbone, together=False)
    return num_bytes


def _check_placed(check: Callable[[], None], backbone: nn.Module, *, fuse: bool) -> None:
    """Check a base at its place; with projections of a group as one product, unless it cannot take their slices."""
    fused = fuse_linears(backbone) if fuse else []
    try:
        check()
    except RuntimeError as error:
        if not fused:
            raise
        logger.debug("projections are multiplied one by one: %s", error)
        unfuse_linears(fused)
        check()


def _look(primary: Any, absent: set[str]) -> _Looked:
    backbone: nn.Module = getattr(primary, primary.base_model_prefix)
    fingerprint = fingerprint_base(backbone, primary.config)  # in the dtype of its checkpoint
    primary.float().eval().requires_grad_(False)
    decoder = is_decoder(primary.config)
    skeletons, unserved = _skeletons(primary, backbone, absent, decoder)
    with torch.inference_mode():
        observed = observe(backbone, lambda: backbone(**probe_batch(backbone)))
        expected = separate_outputs(backbone, primary.config, skeletons)
    embedding = primary.get_input_embeddings()
    return _Looked(
        backbone,
        primary.config,
        decoder,
        fingerprint,
        frozenset(path for path, _ in backbone.named_modules()),
        {path: _host(value) for path, value in backbone.named_parameters()},
        skeletons,
        {skeleton.task: skeleton.drawn() for skeleton in skeletons},
        unserved,
        observed,
        _unrun(primary.config, backbone),
        expected,
        next((path for path, leaf in observed.items() if leaf.module is embedding), ""),
    )


def _skeletons(
    primary: Any, backbone: nn.Module, absent: set[str], decoder: bool
) -> tuple[list[Skeleton], dict[Task, str]]:
    found: list[Skeleton] = []
    unserved: dict[Task, str] = {}
    for task in AUTO_CLASSES:
        if task is Task.GENERATE and not decoder:
            unserved[task] = "the base is an encoder"
        elif not has_class(task, primary.config):
            unserved[task] = f"transformers has no class for it on {primary.config.model_type}"
        else:
            skeleton = build_skeleton(task, primary, backbone, absent)
            if task is Task.GENERATE and skeleton.missing:
                unserved[task] = f"the base's checkpoint lacks {sorted(skeleton.missing)[0]}"
            else:
                found.append(skeleton)
    return found, unserved


def _unrun(config: Any, backbone: nn.Module) -> dict[str, nn.Module]:
    """Without weights: adapters trained on the plain backbone may change what no answer depends on."""
    with torch.device("meta"):
        plain = AutoModel.from_config(config)
    absent = {name for name, _ in plain.named_children()} - {name for name, _ in backbone.named_children()}
    return {path: m for path, m in plain.named_modules() if path.split(".")[0] in absent and is_leaf(m)}


def _make_heads(looked: _Looked) -> dict[Task, TaskHead]:
    """Heads by task; the backbone loses its per-sequence children (a pooler), which run in the head stage."""
    names = {path.split(".")[0] for path, leaf in looked.observed.items() if not leaf.per_token}
    heads: dict[Task, TaskHead] = {}
    for skeleton in looked.skeletons:
        own = sorted(names & skeleton.backbone_children)
        children = {name: copy.deepcopy(looked.backbone.get_submodule(name)) for name in own}
        try:
            heads[skeleton.task] = TaskHead(
                skeleton.task, skeleton.model, skeleton.prefix, children, set(skeleton.missing)
            )
        except ValueError as error:
            looked.unserved[skeleton.task] = str(error)
    for name in names:
        setattr(looked.backbone, name, None)  # architectures skip a pooler that is None
    return heads


def _prove_heads(heads: dict[Task, TaskHead], looked: _Looked, groups: tuple[SiteGroup, ...], name: str) -> None:
    """Drop the heads that are not exact."""
    for skeleton in looked.skeletons:
        if (head := heads.get(skeleton.task)) is None:
            continue
        try:
            prove_head(head, looked.drawn[skeleton.task], groups, looked.expected)
        except BaseModelUnsupported as error:
            del heads[skeleton.task]
            looked.unserved[skeleton.task] = error.message
            logger.warning("base %s: %s adapters are not served: %s", name, skeleton.task, error.message)


def _make_spec(
    name: str,
    looked: _Looked,
    backbone: PackedBackbone | PaddedBackbone,
    heads: dict[Task, TaskHead | PooledHead],
    linears: dict[str, nn.Module],
    sites: tuple[Site, ...],
    groups: tuple[SiteGroup, ...],
    tokenizer: PreTrainedTokenizerBase,
) -> BaseSpec:
    outside = {
        f"{path}.{part}": _host(value)
        for path, linear in linears.items()
        if f"{path}.weight" not in looked.parameters
        for part, value in linear.named_parameters()
    }
    return BaseSpec(
        name=name,
        prefixes=tuple(dict.fromkeys(skeleton.prefix for skeleton in looked.skeletons)),
        sites=sites,
        groups=groups,
        heads={task: head.spec for task, head in heads.items()},
        fingerprint=looked.fingerprint,
        max_length=_max_length(looked.config, tokenizer, backbone),
        modules=looked.modules | looked.unrun.keys(),
        leaves=make_leaves(looked.observed, looked.unrun | linears, packed=isinstance(backbone, PackedBackbone)),
        parameters=looked.parameters | outside,
        is_decoder=looked.decoder,
        word_embedding=looked.word_embedding,
        tied_output=looked.decoder and bool(looked.config.tie_word_embeddings),
        tokenizer_digest=tokenizer_digest(_tokenizer_json(tokenizer)),
        chat_template=_text_or_none(getattr(tokenizer, "chat_template", None)),
        eos_token=_text_or_none(getattr(tokenizer, "eos_token", None)),
        pad_token_id=getattr(looked.config, "pad_token_id", None),
        shared_modules=shared_modules(looked.observed),
        unserved=looked.unserved,
    )


def _host(parameter: torch.Tensor) -> Array:
    return parameter.detach().numpy()


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _tokenizer_json(tokenizer: Any) -> str:
    return tokenizer.backend_tokenizer.to_str()


def _max_length(config: Any, tokenizer: PreTrainedTokenizerBase, backbone: Backbone) -> int:
    """Tokens: the base's positions, less the RoBERTa family's offset, and no more than its tokenizer says."""
    padding_idx = backbone.inputs.padding_idx
    return min(num_positions(config) - (0 if padding_idx is None else padding_idx + 1), int(tokenizer.model_max_length))
