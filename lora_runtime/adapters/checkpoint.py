"""Reading an adapter's weights strictly: every tensor is understood and right, or the adapter is refused.

Everything here is numpy, not torch: a torch operation large enough to be split would start a second team of OpenMP
threads in the loader, and from then on every small operation of the engine is about five times slower (measured: a
fifth of the throughput with 64 adapters on two cores).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch

from lora_runtime.adapters.base_spec import BaseSpec, HeadSpec
from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig, read_config
from lora_runtime.adapters.fingerprint import content_digest, describe_difference, file_sha256
from lora_runtime.adapters.folder import (
    BASE_CONFIG_FILE,
    WEIGHTS_FILE,
    check_folder,
    complete_card,
    make_card,
)
from lora_runtime.adapters.metadata import METADATA_FILE, AdapterMetadata, read_metadata
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterCard, Site

MAX_HEADER_BYTES = 16 << 20
_KEY_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_FLOATING = {"F64", "F32", "F16", "BF16"}

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """One site's pair as PEFT saves it: a [rank, d_in], b [d_out, rank]."""

    site: Site
    a: Array
    b: Array
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated adapter in host memory."""

    card: AdapterCard
    digest: str
    sites: tuple[SiteWeights, ...]  # by site index
    params: dict[str, Array]  # head parameters that the adapter brings, by name

    @property
    def num_parameters(self) -> int:
        lora = sum(w.a.size + w.b.size for w in self.sites)
        return lora + sum(p.size for p in self.params.values())


def read_checkpoint(folder: Path, base: BaseSpec, max_bytes: int) -> Checkpoint:
    """Read and validate a PEFT folder against the served base.

    The digest is of the very bytes that are parsed. Raises AdapterRejected, naming file, tensor or field.
    """
    check_folder(folder)
    config, metadata = read_config(folder), read_metadata(folder)
    _check_base(metadata, base)
    tensors, weights_sha256 = _read_tensors(folder / WEIGHTS_FILE, max_bytes)
    digests = _digests(folder, weights_sha256)
    _check_digests(metadata, digests)
    card = make_card(folder, config, metadata)
    head = base.heads[card.task]
    sites, params = _sort_tensors(tensors, config, base, head)
    num_labels = _check_head(params, head)
    card = complete_card(card, num_labels, f"{WEIGHTS_FILE} tensor {head.output}")
    return Checkpoint(card, content_digest(folder, digests), sites, params)


def _check_base(metadata: AdapterMetadata | None, base: BaseSpec) -> None:
    if metadata is None or metadata.base is None:
        return
    if difference := describe_difference(metadata.base, base.fingerprint):
        raise AdapterRejected(
            "FOREIGN_BASE",
            f"{METADATA_FILE} field base",
            f"the adapter was trained on another base ({metadata.base_model_name or 'unnamed'}): {difference}; "
            f"serve it on that base or train it on {base.name}",
        )


def _read_tensors(path: Path, max_bytes: int) -> tuple[dict[str, Array], str]:
    if path.stat().st_size > max_bytes:
        _refuse("TOO_LARGE", "", f"the file has {path.stat().st_size} bytes, the arena {max_bytes}; give it more")
    data = path.read_bytes()
    header = _read_header(data)
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtype not in _FLOATING:
            _refuse("DTYPE_UNSUPPORTED", key, f"has dtype {dtype}; floating F64, F32, F16 or BF16 is needed")
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise AdapterRejected("WEIGHTS_CORRUPT", WEIGHTS_FILE, f"cannot be read ({error})") from error
    arrays = {key: _as_float32(tensor) for key, tensor in tensors.items()}
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            _refuse("NOT_FINITE", key, "has a NaN, an infinite value, or one beyond the range of float32")
    return arrays, hashlib.sha256(data).hexdigest()


def _as_float32(tensor: torch.Tensor) -> Array:
    """Exact, but for float64; without an operation of torch."""
    if tensor.dtype is torch.bfloat16:  # the upper half of a float32, which numpy has no name for
        halves = tensor.view(torch.int16).numpy().view(np.uint16)
        return (halves.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused
        return tensor.numpy().astype(np.float32, copy=False)


def _read_header(data: bytes) -> dict[str, Any]:
    """The safetensors header: 8 bytes of little-endian length, then JSON whose keys must not repeat."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        _refuse(
            "WEIGHTS_CORRUPT",
            "",
            f"is cut short or has a header of {length} bytes (limit {MAX_HEADER_BYTES})",
        )

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                _refuse("DUPLICATE_TENSOR", key, "appears twice in the header")
            seen[key] = value
        return seen

    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected("WEIGHTS_CORRUPT", WEIGHTS_FILE, f"has a header that is not JSON ({error})") from error
    if not isinstance(header, dict):
        _refuse("WEIGHTS_CORRUPT", "", "has a header that is not a JSON object")
    return header


def _digests(folder: Path, weights_sha256: str) -> dict[str, str]:
    digests = {WEIGHTS_FILE: weights_sha256, CONFIG_FILE: file_sha256(folder / CONFIG_FILE)}
    for name in (METADATA_FILE, BASE_CONFIG_FILE):  # both can decide labels, so both are identity
        if (folder / name).is_file():
            digests[name] = file_sha256(folder / name)
    return digests


def _check_digests(metadata: AdapterMetadata | None, digests: dict[str, str]) -> None:
    for name, promised in (metadata.digests if metadata else {}).items():
        if digests.get(name) != promised:
            found = digests.get(name, "no such file")
            raise AdapterRejected(
                "DIGEST_MISMATCH",
                name,
                f"its SHA-256 is not the one in {METADATA_FILE} ({found[:12]} ≠ {promised[:12]})",
            )


def _sort_tensors(
    tensors: dict[str, Array], config: LoraConfig, base: BaseSpec, head: HeadSpec
) -> tuple[tuple[SiteWeights, ...], dict[str, Array]]:
    pairs: dict[str, dict[str, Array]] = {}
    params: dict[str, Array] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_KEY_PREFIX):
            _refuse("UNEXPECTED_TENSOR", key, f"does not start with {_KEY_PREFIX!r}; save the adapter with PEFT")
        path = key.removeprefix(_KEY_PREFIX)
        if match := _LORA_KEY.fullmatch(path):
            pairs.setdefault(match["module"], {})[match["which"]] = tensor
        else:
            name = path.removeprefix(f"{base.prefix}.")
            _check_param(key, name, tensor, base, head)
            if name in params:
                _refuse("DUPLICATE_TENSOR", key, "gives a parameter of the head under a second name")
            params[name] = tensor
    sites = [_site_weights(module, pair, config, base) for module, pair in pairs.items()]
    if not sites:
        _refuse("NO_LORA", "", "has no lora_A and lora_B tensors: the adapter adapts nothing")
    if len({weights.site.index for weights in sites}) != len(sites):
        _refuse("DUPLICATE_TENSOR", "", "adapts one module under two names")
    adapted = {weights.site.index for weights in sites}
    for site in base.sites:  # a pooler may be in modules_to_save instead
        if not site.per_sequence and site.index not in adapted and config.names_as_target(f"{base.prefix}.{site.name}"):
            missing = f"{_KEY_PREFIX}{base.prefix}.{site.name}.lora_A.weight"
            _refuse("MISSING_TENSOR", missing, f"is missing; target_modules of {CONFIG_FILE} names the module")
    return tuple(sorted(sites, key=lambda weights: weights.site.index)), params


def _site_weights(module: str, pair: dict[str, Array], config: LoraConfig, base: BaseSpec) -> SiteWeights:
    name = module.removeprefix(f"{base.prefix}.")
    where = f"{_KEY_PREFIX}{module}"
    site = base.site(name)
    if site is None:
        known = name in base.modules
        _refuse(
            "SITE_UNSUPPORTED" if known else "FOREIGN_BASE",
            where,
            "adapts a module that is not a served linear projection"
            if known
            else f"the base {base.name} has no such module",
        )
    for which in "AB":
        if which not in pair:
            _refuse("MISSING_TENSOR", f"{where}.lora_{which}.weight", "is missing; its other half is there")
    a, b = pair["A"], pair["B"]
    rank = config.rank(module)
    for which, tensor, shape in (("A", a, (rank, site.d_in)), ("B", b, (site.d_out, rank))):
        if tuple(tensor.shape) != shape:
            message = f"has shape {list(tensor.shape)}, {list(shape)} is needed by the config and the base"
            _refuse("SHAPE_MISMATCH", f"{where}.lora_{which}.weight", message)
    scaling = config.scaling(module)
    if abs(scaling) > _MAX_FLOAT32:
        message = f"lora_alpha gives {where} a scaling of {scaling:g}, beyond the range of float32"
        raise AdapterRejected("CONFIG_INVALID", CONFIG_FILE, message)
    return SiteWeights(site, a, b, scaling)


def _check_param(key: str, name: str, tensor: Array, base: BaseSpec, head: HeadSpec) -> None:
    shape = head.shapes.get(name)
    if shape is None:
        module = name.rpartition(".")[0]
        if name in head.fixed or (module and module in base.modules):
            _refuse("FEATURE_UNSUPPORTED", key, "replaces a module of the base, which is not served yet")
        _refuse("UNEXPECTED_TENSOR", key, f"belongs neither to LoRA nor to the {head.task} head of {base.name}")
    found = tuple(tensor.shape)
    if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
        wanted = ["labels" if n is None else n for n in shape]
        _refuse("SHAPE_MISMATCH", key, f"has shape {list(found)}, {wanted} is needed")


def _check_head(params: dict[str, Array], head: HeadSpec) -> int:
    """Refuse an incomplete head; the number of labels."""
    for name in head.shapes:
        if name not in params and name not in head.from_base:
            _refuse(
                "HEAD_MISSING",
                name,
                f"is missing: the adapter has no {head.task} head; train it with the head in modules_to_save",
            )
    if head.output not in params:  # the base itself is a fine-tuned classifier; its rows are not this adapter's labels
        _refuse("HEAD_MISSING", head.output, "is missing, and another model's labels are not used in its place")
    rows = {name: params[name].shape[0] for name, shape in head.shapes.items() if shape[0] is None and name in params}
    if len(set(rows.values())) != 1 or not all(rows.values()):
        _refuse(
            "SHAPE_MISMATCH",
            ", ".join(rows),
            f"disagree on the number of labels: {sorted(set(rows.values()))}",
        )
    return next(iter(rows.values()))


def _refuse(code: str, tensor: str, message: str) -> NoReturn:
    raise AdapterRejected(code, f"{WEIGHTS_FILE} tensor {tensor}" if tensor else WEIGHTS_FILE, message)
