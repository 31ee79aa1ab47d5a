"""What PEFT's LoRA can be: one registry of what is served and how, and of what is refused and why.

Refusals are raised from it and the README's table is written from it, so neither can say what the other does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig
from lora_runtime.adapters.findings import Findings
from lora_runtime.errors import AdapterRejected

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_RECOMPUTED_INITS = frozenset({"pissa", "olora"})
_RANDOM_PISSA = re.compile(r"pissa_niter_\d+")
_CONVERT_INIT = "save it converted to plain LoRA (path_initial_model_for_weight_conversion in PEFT's save_pretrained)"
_CONVERT_METHOD = (
    "convert it with peft.save_as_lora(path, model, rank), which knows LoHa, LoKr, MiSS, DeLoRA, C3A and others"
)


def _never(config: LoraConfig) -> bool:
    del config
    return False


@dataclass(frozen=True, slots=True)
class Variant:
    """One feature of PEFT's LoRA."""

    name: str
    field: str  # of adapter_config.json
    how: str  # it is served; empty: it is refused
    asked: Callable[[LoraConfig], bool] = _never
    code: str = ""  # of the refusal
    reason: str = ""  # why it is refused, and the remedy
    exclusive: bool = False  # PEFT has no combination with another exclusive one

    @property
    def served(self) -> bool:
        return not self.code

    def refuse(self, value: object) -> NoReturn:
        """Raise the refusal; `value` is what the config holds."""
        shown = repr(value)
        given = shown if len(shown) <= 80 else f"{shown[:80]}…"
        raise AdapterRejected(self.code, f"{CONFIG_FILE} field {self.field}", f"is {given}: {self.reason}")


def _init_is(*names: str) -> Callable[[LoraConfig], bool]:
    return lambda config: config.init in names


DORA = Variant(
    "DoRA", "use_dora", "a gain per output row, from norms computed once at load", lambda c: c.use_dora, exclusive=True
)
LORA_BIAS = Variant("bias of LoRA", "lora_bias", "a shift per output, scaled like B", lambda c: c.lora_bias)
ALORA = Variant(
    "aLoRA",
    "alora_invocation_tokens",
    "for generation: active from the last invocation on, as PEFT is",
    lambda c: bool(c.alora_invocation_tokens),
    exclusive=True,
)
RECOMPUTED = Variant(
    "PiSSA and OLoRA, unconverted",
    "init_lora_weights",
    "the base's own SVD or QR is computed at load; rank 2r",
    lambda c: c.init in _RECOMPUTED_INITS,
)
KASA = Variant(
    "KaSA",
    "kasa_config",
    "the base's own SVD is computed at load; rank 2r",
    lambda c: c.kasa_config is not None,
    exclusive=True,
)
BD_LORA = Variant(
    "BD-LoRA", "use_bdlora", "blocks written out as a dense matrix", lambda c: bool(c.use_bdlora), exclusive=True
)
MICA = Variant("MiCA", "init_lora_weights", "plain at inference", _init_is("mica"), exclusive=True)
TOKENS = Variant(
    "trainable tokens",
    "trainable_token_indices",
    "replaced rows of the embedding, and of a tied output layer",
    lambda c: bool(c.trainable_token_indices),
)
OTHER_METHODS = Variant(
    "other PEFT methods", "peft_type", "", code="NOT_LORA", reason=f"only LORA is served; {_CONVERT_METHOD}"
)
UNKNOWN_INIT = Variant(
    "an unknown initialisation",
    "init_lora_weights",
    "",
    lambda c: bool(c.init) and c.init not in _KNOWN_INITS and not _RANDOM_PISSA.fullmatch(c.init),
    code="INIT_UNKNOWN",
    reason="PEFT knows no such initialisation, so whether it changed the base is not known; correct the name",
)

VARIANTS: tuple[Variant, ...] = (
    Variant("LoRA", "r, lora_alpha", "any rank, with no padding to a maximum"),
    Variant("rsLoRA", "use_rslora", "scaling alpha / sqrt(r)", lambda c: c.use_rslora),
    Variant("rank per module", "rank_pattern", "PEFT's rule, in file order", lambda c: bool(c.rank_pattern)),
    Variant("alpha per module", "alpha_pattern", "PEFT's rule, in file order", lambda c: bool(c.alpha_pattern)),
    Variant("layers by index", "layers_to_transform", "by keys", lambda c: c.layers_to_transform is not None),
    Variant("excluded modules", "exclude_modules", "by keys", lambda c: bool(c.exclude_modules)),
    Variant(
        "Conv1D bases (GPT-2)", "fan_in_fan_out", "by the type of the base's module, as PEFT does",
        lambda c: c.fan_in_fan_out,
    ),
    LORA_BIAS,
    Variant(
        "trained biases", "bias", "all of the base's, or those of adapted modules; norms too",
        lambda c: c.bias != "none",
    ),
    DORA,
    Variant(
        "whole modules", "modules_to_save", "heads, linear layers, norms, embeddings, the output layer",
        lambda c: bool(c.modules_to_save),
    ),
    TOKENS,
    Variant("kept weight tying", "ensure_weight_tying", "as the keys have it", lambda c: c.ensure_weight_tying),
    ALORA,
    RECOMPUTED,
    KASA,
    BD_LORA,
    MICA,
    Variant("EVA", "init_lora_weights", "plain at inference; ranks by rank_pattern", _init_is("eva")),
    Variant("Gaussian, orthogonal", "init_lora_weights", "plain at inference", _init_is("gaussian", "orthogonal")),
    Variant(
        "VeLoRA", "velora_config", "plain at inference", lambda c: c.velora_config is not None, exclusive=True
    ),
    Variant(
        "MonteCLoRA", "monteclora_config", "plain at inference: PEFT samples in training only",
        lambda c: c.monteclora_config is not None, exclusive=True,
    ),
    Variant(
        "PiSSA by randomised SVD", "init_lora_weights", "", lambda c: bool(_RANDOM_PISSA.fullmatch(c.init)),
        "PISSA_RANDOMISED", f"the base was changed by a random decomposition that nobody can repeat; {_CONVERT_INIT}",
    ),
    Variant(
        "LoftQ", "init_lora_weights", "", _init_is("loftq"), "LOFTQ_UNCONVERTED",
        "it was trained on a base that LoftQ quantised; train on the base that is served, or merge and extract LoRA",
    ),
    Variant(
        "CorDA, unconverted", "init_lora_weights", "", _init_is("corda"), "CORDA_UNCONVERTED",
        f"the base was changed by a decomposition of the training data; {_CONVERT_INIT}",
    ),
    Variant(
        "LoRA-GA, unconverted", "init_lora_weights", "", _init_is("lora_ga"), "LORA_GA_UNCONVERTED",
        f"the base was changed by gradients of the training data; {_CONVERT_INIT}",
    ),
    UNKNOWN_INIT,
    Variant(
        "QALoRA", "use_qalora", "", lambda c: c.use_qalora, "QALORA",
        "it was trained on a GPTQ-quantised base, which is not the one served; train plain LoRA on this base",
    ),
    Variant(
        "LoRA of parameters (MoE experts)", "target_parameters", "", lambda c: bool(c.target_parameters),
        "TARGET_PARAMETERS", "LoRA on bare parameters is not served; adapt linear modules by target_modules",
    ),
    Variant(
        "replicated layers", "layer_replication", "", lambda c: bool(c.layer_replication), "LAYER_REPLICATION",
        "the adapted model has another depth than the base; train an adapter without it",
    ),
    Variant(
        "Arrow routing", "arrow_config", "", lambda c: c.arrow_config is not None, "ARROW",
        "it routes between other adapters and has no weights of its own; serve those adapters",
    ),
    Variant(
        "merged projections of early PEFT", "enable_lora", "", lambda c: bool(c.enable_lora), "MERGED_LINEAR",
        "its A and B are laid out for a layer that PEFT no longer has; train it again with PEFT 0.3 or later",
    ),
    OTHER_METHODS,
)  # fmt: skip
_KNOWN_INITS = _PLAIN_INITS | _RECOMPUTED_INITS | {"loftq", "corda", "lora_ga"}

# Pairs that PEFT itself refuses, or that cannot be told apart once in plain A and B.
_CONFLICTS: tuple[tuple[Variant, Variant, str], ...] = (
    (LORA_BIAS, DORA, "PEFT has no lora_bias with DoRA"),
    (LORA_BIAS, ALORA, "a bias would be active before the invocation too"),
    (RECOMPUTED, ALORA, "what the initialisation took from the base is active before the invocation too"),
    (RECOMPUTED, KASA, "each changes the base the other was made from"),
    (RECOMPUTED, BD_LORA, "PEFT changes the base by a dense initialisation and then forgets it"),
)


def check_method(raw: Mapping[str, Any]) -> None:
    """Raise AdapterRejected unless the config is of PEFT's LoRA."""
    if raw.get("peft_type") != "LORA":
        OTHER_METHODS.refuse(raw.get("peft_type"))


def check_variants(config: LoraConfig, findings: Findings) -> tuple[Variant, ...]:
    """The features a config uses; raises AdapterRejected for each that is refused, and for combinations."""
    asked = tuple(variant for variant in VARIANTS if variant.asked(config))
    for variant in asked:
        with findings.attempt():
            if not variant.served:
                variant.refuse(getattr(config, variant.field))
    with findings.attempt():
        _check_combination(config, asked)
    return asked


def check_embedding(module: str, asked: tuple[Variant, ...]) -> None:
    """Raise AdapterRejected for a feature that PEFT does not have on embeddings."""
    for variant in asked:
        if variant is LORA_BIAS or (variant.exclusive and variant not in (DORA, MICA)):
            where = f"{CONFIG_FILE} field {variant.field}"
            raise AdapterRejected("VARIANT_CONFLICT", where, f"PEFT has no {variant.name} on an embedding ({module})")


def _check_combination(config: LoraConfig, asked: tuple[Variant, ...]) -> None:
    exclusive = [variant for variant in asked if variant.exclusive]
    if len(exclusive) > 1:
        _conflict(exclusive[0], exclusive[1], "PEFT has no such combination")
    for first, second, reason in _CONFLICTS:
        if first in asked and second in asked:
            _conflict(first, second, reason)
    if config.lora_bias and config.init:
        where = f"{CONFIG_FILE} field lora_bias"
        raise AdapterRejected(
            "VARIANT_CONFLICT", where, f"PEFT has no lora_bias with init_lora_weights {config.init!r}"
        )


def _conflict(first: Variant, second: Variant, reason: str) -> NoReturn:
    where = f"{CONFIG_FILE} fields {first.field} and {second.field}"
    raise AdapterRejected("VARIANT_CONFLICT", where, f"{first.name} and {second.name}: {reason}; train one of them")


def support_rows() -> list[tuple[str, str, str, str]]:
    """(variant, field, "served" or "refused", how or why) of every feature."""
    return [(v.name, v.field, "served" if v.served else "refused", v.how if v.served else v.reason) for v in VARIANTS]


def support_table() -> str:
    """The registry as a markdown table."""
    rows = [("PEFT", "`adapter_config.json`", "here", "how, or why not"), ("---",) * 4]
    rows += [(name, f"`{field}`", state, text) for name, field, state, text in support_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
