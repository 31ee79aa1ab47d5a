"""`adapter_config.json`: the fields that matter at inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.metadata import describe_validation
from lora_runtime.adapters.patterns import PatternTable
from lora_runtime.errors import AdapterRejected

CONFIG_FILE = "adapter_config.json"

# Fields of PEFT's LoraConfig that change no answer: where the adapter came from, and how it was trained.
_IGNORED = {
    "auto_mapping", "base_model_class", "parent_library", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip

_MAX_FLOAT32 = 3.4028234663852886e38

_Rank = Annotated[int, Field(ge=1)]
_Alpha = Annotated[float, Field(allow_inf_nan=False)]
_TokenIds = list[Annotated[int, Field(ge=0)]]


class BlockDiagonal(BaseModel):
    """BD-LoRA: which modules have a block-diagonal A or B, by parts of their path."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: Annotated[int, Field(ge=1)] = 1
    match_strict: bool = True

    def blocks(self, module: str) -> tuple[int, int]:
        """How many blocks (A, B) of a module have; 1 is a dense matrix. Raises AdapterRejected as PEFT would."""
        in_a = any(part in module for part in self.target_modules_bd_a or ())
        in_b = any(part in module for part in self.target_modules_bd_b or ())
        if in_a == in_b and (in_a or self.match_strict):
            message = f"{module} matches {'both lists' if in_a else 'neither list'} of block-diagonal modules"
            raise AdapterRejected("CONFIG_INVALID", f"{CONFIG_FILE} field use_bdlora", message)
        return self.nblocks if in_a else 1, self.nblocks if in_b else 1


class LoraConfig(BaseModel):
    """The fields of PEFT's LoraConfig that change an answer; the defaults are PEFT's, which old files leave out.

    Which modules are adapted is read from the tensors' keys; `targets.py` finds those that are promised and missing.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: _Rank = 8
    lora_alpha: _Alpha = 8
    use_rslora: bool = False
    fan_in_fan_out: bool = False  # PEFT itself goes by the type of each module
    rank_pattern: dict[str, _Rank] = Field(default_factory=dict[str, int])
    alpha_pattern: dict[str, _Alpha] = Field(default_factory=dict[str, float])
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] = Field(default_factory=list[str])
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    trainable_token_indices: _TokenIds | dict[str, _TokenIds] | None = None
    ensure_weight_tying: bool = False
    alora_invocation_tokens: _TokenIds = Field(default_factory=list[int])
    use_bdlora: BlockDiagonal | Literal[False] | None = None
    use_qalora: bool = False
    kasa_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    target_parameters: list[str] = Field(default_factory=list[str])
    layer_replication: list[Any] = Field(default_factory=list[Any])
    enable_lora: list[Any] = Field(default_factory=list[Any])
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    _ranks: PatternTable[int] = PrivateAttr()
    _alphas: PatternTable[float] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        del context
        self._ranks = PatternTable(CONFIG_FILE, "rank_pattern", self.rank_pattern)
        self._alphas = PatternTable(CONFIG_FILE, "alpha_pattern", self.alpha_pattern)

    @property
    def init(self) -> str:
        """The name of the initialisation in lower case; empty for PEFT's own."""
        return self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else ""

    def rank(self, module: str) -> int:
        """The rank promised for a module path, by the first pattern that matches."""
        return self._ranks.lookup(module, self.r)

    def alpha(self, module: str) -> float:
        """The alpha of a module path, by the first pattern that matches."""
        return self._alphas.lookup(module, self.lora_alpha)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self.alpha(module)
        scaling = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        if abs(scaling) > _MAX_FLOAT32:
            message = f"lora_alpha gives {module} a scaling of {scaling:g}, beyond the range of float32"
            raise AdapterRejected("CONFIG_INVALID", CONFIG_FILE, message)
        return scaling


def parse_config(raw: Mapping[str, Any], findings: Findings) -> LoraConfig:
    """Check the content of `adapter_config.json`; raises AdapterRejected with the field and the remedy."""
    try:
        config = LoraConfig.model_validate({key: value for key, value in raw.items() if not _is_absent(key, value)})
    except ValidationError as error:
        raise AdapterRejected("CONFIG_INVALID", CONFIG_FILE, describe_validation(error)) from error
    if unknown := sorted(set(raw) - set(LoraConfig.model_fields) - _IGNORED):
        shown = ", ".join(field[:40] for field in unknown[:10])
        findings.warn(f"{CONFIG_FILE} has {len(unknown)} unknown fields, which are ignored: {shown}")
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        _refuse("layers_to_transform", "is set beside a target_modules that is a pattern, which PEFT refuses")
    if config.layers_pattern and config.layers_to_transform is None:
        _refuse("layers_pattern", "is set without layers_to_transform, which PEFT refuses")
    return config


def _is_absent(key: str, value: object) -> bool:
    """Old and new PEFT write null for a field at its default."""
    return value is None and key not in ("r", "lora_alpha")


def _refuse(field: str, message: str) -> NoReturn:
    raise AdapterRejected("CONFIG_INVALID", f"{CONFIG_FILE} field {field}", message)
