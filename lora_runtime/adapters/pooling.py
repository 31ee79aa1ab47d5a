"""How an embedding adapter pools, as sentence-transformers writes it beside the weights."""

from __future__ import annotations

from typing import Any

from lora_runtime.adapters.folder import AdapterFolder
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import Pooling

MODULES_FILE = "modules.json"
POOLING_FILE = "1_Pooling/config.json"
_POOLING_OF = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}
_POOLING_OF_NAME = {"mean": Pooling.MEAN, "cls": Pooling.CLS, "lasttoken": Pooling.LAST}


def read_pooling(folder: AdapterFolder) -> tuple[Pooling | None, bool]:
    """(pooling, whether vectors are normalised); None where the folder says nothing.

    Raises AdapterRejected for modules after the encoder, or a pooling, that are not served.
    """
    modules = folder.read_json(MODULES_FILE)
    names = _module_names(modules) if modules is not None else ()
    if unknown := sorted(set(names) - {"Transformer", "Pooling", "Normalize"}):
        message = f"has a module {unknown[0]!r} after the encoder, which is not served; merge it or train without it"
        raise AdapterRejected("FEATURE_UNSUPPORTED", MODULES_FILE, message)
    config = folder.read_object(POOLING_FILE)
    return (None if config is None else _pooling(config)), "Normalize" in names


def _module_names(modules: Any) -> tuple[str, ...]:
    try:
        return tuple(str(module["type"]).rpartition(".")[2] for module in modules)
    except (TypeError, KeyError) as error:
        message = "is not a list of modules with a type each"
        raise AdapterRejected("JSON_INVALID", MODULES_FILE, message) from error


def _pooling(config: dict[str, Any]) -> Pooling:
    chosen = sorted(key for key, value in config.items() if key.startswith("pooling_mode_") and value is True)
    pooling = _POOLING_OF.get(chosen[0]) if len(chosen) == 1 else None
    if not chosen:
        chosen = [str(config.get("pooling_mode"))]
        pooling = _POOLING_OF_NAME.get(chosen[0])
    if pooling is None:
        message = f"pools by {' and '.join(chosen)}; exactly one of mean, cls and lasttoken is served"
        raise AdapterRejected("FEATURE_UNSUPPORTED", POOLING_FILE, message)
    return pooling
