"""The fingerprint of a base model, which tells whether an adapter was trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lora_runtime.adapters.metadata import BaseFingerprint

SAMPLES_PER_TENSOR = 64


def fingerprint_base(backbone: nn.Module, config: object) -> BaseFingerprint:
    """Fingerprint an unwrapped transformers backbone, in the dtype of its checkpoint."""
    parameters = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    return fingerprint_parameters(parameters, parameters.__getitem__, config)


def fingerprint_parameters(
    names: Iterable[str], read: Callable[[str], torch.Tensor], config: object
) -> BaseFingerprint:
    """Fingerprint a backbone by the names of its parameters, each read once, one after the other.

    Of each parameter, 64 evenly spaced values (first and last included) are hashed as fp32 with its name and
    shape. A top-level `pooler` is left out: a task class may have drawn it at random where the checkpoint has none.
    """
    structure, weights = hashlib.sha256(), hashlib.sha256()
    for name in sorted(names):
        if name.split(".", 1)[0] == "pooler":
            continue
        parameter = read(name)
        header = f"{name}{tuple(parameter.shape)}".encode()
        structure.update(header)
        weights.update(header)
        weights.update(_samples(parameter).numpy().tobytes())
    return BaseFingerprint(
        model_type=str(getattr(config, "model_type", "")),
        hidden_size=int(getattr(config, "hidden_size", 0)),
        num_layers=int(getattr(config, "num_hidden_layers", 0)),
        vocab_size=int(getattr(config, "vocab_size", 0)),
        modules_sha256=structure.hexdigest(),
        weights_sha256=weights.hexdigest(),
    )


def _samples(parameter: torch.Tensor) -> torch.Tensor:
    flat = parameter.reshape(-1)
    count = min(SAMPLES_PER_TENSOR, flat.numel())
    steps = torch.arange(count, dtype=torch.int64)
    index = steps * (flat.numel() - 1) // max(count - 1, 1)
    return flat[index.to(flat.device)].float().cpu()


def describe_difference(found: BaseFingerprint, served: BaseFingerprint) -> str | None:
    """The first field in which two fingerprints differ, as a phrase; None when they agree."""
    for field in BaseFingerprint.model_fields:
        theirs, ours = getattr(found, field), getattr(served, field)
        if theirs != ours:
            if field.endswith("_sha256"):
                return (
                    f"{field} differs (same shapes, other weights)" if field == "weights_sha256" else f"{field} differs"
                )
            return f"{field} is {theirs}, the served base has {ours}"
    return None
