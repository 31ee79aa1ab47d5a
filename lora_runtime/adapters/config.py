"""`adapter_config.json`: the fields that matter at inference, and the refusal of what is not supported."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lora_runtime.adapters.metadata import describe_validation, read_json_object
from lora_runtime.adapters.patterns import PatternTable
from lora_runtime.errors import AdapterRejected

CONFIG_FILE = "adapter_config.json"

# A field that changes inference, with the values that change nothing.
_MUST_BE_OFF: dict[str, tuple[object, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "arrow_config": (None,),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
_PLAIN_INIT = {"gaussian", "eva", "orthogonal"}  # initial values only: plain LoRA at inference
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "base_model_class", "parent_library", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type", "ensure_weight_tying", "bias_pattern",
    "velora_config",
}  # fmt: skip

_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]

logger = logging.getLogger(__name__)


class LoraConfig(BaseModel):
    """The fields of PEFT's LoraConfig that give each site's rank and scaling.

    Which modules are adapted is read from the tensors' keys; `target_modules` only tells that some are missing.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, _Rank] = Field(default_factory=dict[str, int])
    alpha_pattern: dict[str, _Alpha] = Field(default_factory=dict[str, float])
    target_modules: list[str] | str | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    _ranks: PatternTable[int] = PrivateAttr()
    _alphas: PatternTable[float] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        del context
        self._ranks = PatternTable(CONFIG_FILE, "rank_pattern", self.rank_pattern)
        self._alphas = PatternTable(CONFIG_FILE, "alpha_pattern", self.alpha_pattern)

    def names_as_target(self, module: str) -> bool:
        """Whether `target_modules` lists the module by name; False where a pattern or another field decides."""
        others = self.model_extra or {}
        narrowed = others.get("exclude_modules") or others.get("layers_to_transform") is not None
        if narrowed or not isinstance(self.target_modules, list):
            return False
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)

    def rank(self, module: str) -> int:
        """The rank promised for a module path, by the first pattern that matches."""
        return self._ranks.lookup(module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self._alphas.lookup(module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(folder: Path) -> LoraConfig:
    """Read and check `adapter_config.json`; raises AdapterRejected with the field and the remedy."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterRejected("CONFIG_MISSING", CONFIG_FILE, "is not in the folder; is this a PEFT adapter?")
    raw = read_json_object(path)
    if raw.get("peft_type") != "LORA":
        kind = raw.get("peft_type")
        raise AdapterRejected("NOT_LORA", CONFIG_FILE, f"peft_type is {kind!r}; only LORA is served")
    try:
        config = LoraConfig.model_validate({key: value for key, value in raw.items() if not _is_absent(key, value)})
    except ValidationError as error:
        raise AdapterRejected("CONFIG_INVALID", CONFIG_FILE, describe_validation(error)) from error
    _refuse_unsupported(raw, config)
    return config


def _is_absent(key: str, value: object) -> bool:
    """Old and new PEFT write null for a field at its default."""
    return value is None and key not in ("r", "lora_alpha")


def _refuse_unsupported(raw: dict[str, Any], config: LoraConfig) -> None:
    for field, harmless in _MUST_BE_OFF.items():
        if field in raw and raw[field] not in harmless:
            raise AdapterRejected(
                "FEATURE_UNSUPPORTED",
                f"{CONFIG_FILE} field {field}",
                f"is {raw[field]!r}, which is not served yet",
            )
    init = config.init_lora_weights
    if isinstance(init, str) and init not in _PLAIN_INIT:
        raise AdapterRejected(
            "FEATURE_UNSUPPORTED",
            f"{CONFIG_FILE} field init_lora_weights",
            f"is {init!r}, which changes the base; save it converted to plain LoRA "
            "(path_initial_model_for_weight_conversion in PEFT's save_pretrained)",
        )
    known = set(LoraConfig.model_fields) | set(_MUST_BE_OFF) | _IGNORED
    if unknown := sorted(set(raw) - known):
        shown = ", ".join(field[:40] for field in unknown[:10])
        logger.warning("%s has %d unknown fields, which are ignored: %s", CONFIG_FILE, len(unknown), shown)
