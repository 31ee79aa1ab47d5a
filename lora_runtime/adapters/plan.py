"""Planning an adapter: what each module gets, from JSON files and safetensors headers. No value is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_runtime.adapters.alone import check_alone
from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.card import CardFiles, count_labels
from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig, parse_config
from lora_runtime.adapters.findings import Findings
from lora_runtime.adapters.fingerprint import describe_difference
from lora_runtime.adapters.folder import BASE_CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, open_folder, read_headers
from lora_runtime.adapters.header import TensorRef
from lora_runtime.adapters.keys import Locator, ModuleKeys, Part, SortedKeys, sort_keys
from lora_runtime.adapters.metadata import METADATA_FILE, AdapterMetadata, parse_metadata
from lora_runtime.adapters.modules import ModulePlan, Planner
from lora_runtime.adapters.promises import Promises
from lora_runtime.adapters.targets import Targets
from lora_runtime.adapters.tokenizer import own_tokenizer
from lora_runtime.adapters.variants import KASA, Variant, check_method, check_variants
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import AdapterCard, Task

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class AdapterPlan:
    """What is known of an adapter before its values are read."""

    folder: AdapterFolder
    config: LoraConfig
    metadata: AdapterMetadata | None
    variants: tuple[Variant, ...]  # those of VARIANTS that it uses
    tensors: tuple[TensorRef, ...] = ()  # all that its files hold
    task: Task | None = None  # None: no base, and the files do not say
    card: AdapterCard | None = None  # None: no base, or a problem was found
    modules: tuple[ModulePlan, ...] = ()  # all but the head's, by path
    head: dict[str, TensorRef] = field(default_factory=dict[str, TensorRef])  # parameters of its head, by name
    ignored: tuple[str, ...] = ()  # keys that change nothing at inference

    @property
    def num_parameters(self) -> int:
        """In its files."""
        return sum(ref.size for ref in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of its image in float32, without alignment; without a base, of what is known."""
        head = sum(ref.size for ref in self.head.values())
        return 4 * (head + sum(module.num_image_elements for module in self.modules))

    @property
    def num_stored_bytes(self) -> int:
        """Bytes in its files, without copies that may be the base's own."""
        copies = [module.copy for module in self.modules if module.copy is not None and module.may_be_base]
        return sum(ref.end - ref.start for ref in self.tensors) - sum(ref.end - ref.start for ref in copies)


def read_card(folder: Path, base: BaseSpec, name: str | None = None) -> AdapterCard:
    """What the adapter answers; raises AdapterRejected for all that can be known without its values.

    `name` is what warnings call it, by default its folder's.
    """
    findings = Findings()
    plan = plan_adapter(folder, base, findings)
    for warning in findings.warnings:
        logger.warning("adapter %s: %s", name or folder.name, warning)
    assert plan is not None and plan.card is not None
    return plan.card


def plan_adapter(folder: Path, base: BaseSpec | None, findings: Findings) -> AdapterPlan | None:
    """Plan a PEFT folder against a base, or alone; the problems are raised or kept, as `findings` says.

    None only when problems are kept and the folder or its config cannot be understood at all.
    """
    plan = None
    with findings.attempt():
        plan = _open(folder, findings)
    if plan is None:
        return None
    with findings.attempt():
        content = plan.folder.read_object(METADATA_FILE)
        plan.metadata = None if content is None else parse_metadata(content)
    tensors: dict[str, TensorRef] | None = None
    with findings.attempt():
        tensors = read_headers(plan.folder)
    if tensors is None:
        return plan
    plan.tensors = tuple(tensors.values())
    keys = sort_keys(plan.tensors, findings)
    plan.ignored = keys.unused
    with findings.attempt():
        if base is None:
            _describe(plan, keys)
            check_alone(plan.config, keys, plan.task, findings, kasa=KASA in plan.variants)
            _check_adapts(plan, keys)
        else:
            _check_base(plan.metadata, base)
            _match(plan, keys, base, findings)
    if findings.problems and not plan.modules:
        _describe(plan, keys)
    return plan


def _open(folder: Path, findings: Findings) -> AdapterPlan:
    opened = open_folder(folder)
    raw = opened.read_object(CONFIG_FILE)
    if raw is None:
        raise AdapterRejected("CONFIG_MISSING", CONFIG_FILE, "is not in the folder; is this a PEFT adapter?")
    check_method(raw)
    config = parse_config(raw, findings)
    return AdapterPlan(opened, config, None, check_variants(config, findings))


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


def _describe(plan: AdapterPlan, keys: SortedKeys) -> None:
    """What the keys say alone; parameters saved whole are shown as modules."""
    files = CardFiles(plan.folder, plan.config, plan.metadata)
    plan.task = files.guess_task(f"{path}.{name}" for path, module in keys.modules.items() for name in module.params)
    plan.modules = tuple(_bare(module, plan.config) for _, module in sorted(keys.modules.items()))


def _bare(keys: ModuleKeys, config: LoraConfig) -> ModulePlan:
    plan = ModulePlan(keys.path, keys.path, parts=dict(keys.parts), params=dict(keys.params))
    plan.copy = plan.parts.pop(Part.BASE_WEIGHT, None)
    plan.bias = plan.parts.pop(Part.BASE_BIAS, None)
    first = plan.parts.get(Part.A) or plan.parts.get(Part.EMBED_A)
    if first is not None and first.shape:
        plan.rank = first.shape[0]
        plan.scaling = config.scaling(keys.path, max(plan.rank, 1))
    return plan


def _match(plan: AdapterPlan, keys: SortedKeys, base: BaseSpec, findings: Findings) -> None:
    locator = Locator(base)
    files = CardFiles(plan.folder, plan.config, plan.metadata)
    params = {locator.locate(path): module.params for path, module in keys.modules.items() if module.params}
    plan.task = files.task(base, (f"{name}.{param}" for name, module in params.items() for param in module))
    head = base.heads[plan.task]
    planner = Planner(plan.config, plan.variants, base, head, locator, Targets(plan.config), findings)
    plans: dict[str, ModulePlan] = {}
    for module in keys.modules.values():
        with findings.attempt():
            _plan_module(planner, module, plans)
    _check_adapts(plan, keys)
    refused = frozenset(map(locator.locate, keys.modules)) - plans.keys() if findings.problems else frozenset[str]()
    Promises.of(planner, plans, refused).check()
    plan.head = planner.head_params
    plan.modules = tuple(module for _, module in sorted(plans.items()))
    if planner.unused:
        shown = ", ".join(planner.unused[:10])
        findings.warn(f"{WEIGHTS_FILE} adapts modules that are not run to {plan.task}, which is ignored: {shown}")
    with findings.attempt():
        num_labels = count_labels(head, plan.head)
        plan.card = files.card(plan.task, base, num_labels)
        if plan.card.labels and files.labels_are_placeholders:
            findings.warn(
                f"no file names its {len(plan.card.labels)} labels, which are LABEL_0 and so on; name them in "
                f"{METADATA_FILE}, or in id2label of a {BASE_CONFIG_FILE} beside the adapter"
            )
    with findings.attempt():
        _set_tokenizer(plan, base, plans.get(base.word_embedding))


def _plan_module(planner: Planner, keys: ModuleKeys, plans: dict[str, ModulePlan]) -> None:
    module = planner.plan(keys)
    if module is None:
        return
    if module.name in plans:
        where = f"{WEIGHTS_FILE} module {module.path}"
        raise AdapterRejected("DUPLICATE_TENSOR", where, f"is changed under two names; {plans[module.name].path} too")
    plans[module.name] = module


def _check_adapts(plan: AdapterPlan, keys: SortedKeys) -> None:
    if not any(module.is_adapted for module in keys.modules.values()):
        message = "has no lora_A and lora_B tensors: the adapter adapts nothing"
        raise AdapterRejected("NO_LORA", ", ".join(plan.folder.weights), message)


def _set_tokenizer(plan: AdapterPlan, base: BaseSpec, words: ModulePlan | None) -> None:
    rows = base.num_token_ids
    if words is not None:
        rows = max(words.table_rows, 1 + max(words.token_ids, default=-1))
    sha256 = own_tokenizer(plan.folder, base, base.fingerprint.vocab_size if rows is None else rows)
    if plan.card is not None:
        plan.card = replace(plan.card, tokenizer_sha256=sha256, num_token_ids=rows)
