"""What the config promises and the keys must hold, and what follows from tied weights.

A missing tensor would be drawn at random, or left at the base's, by PEFT, which only warns of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

from lora_runtime.adapters.base_spec import Leaf, LeafKind
from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.folder import WEIGHTS_FILE
from lora_runtime.adapters.keys import KEY_PREFIX, Part
from lora_runtime.adapters.modules import ModulePlan, Planner
from lora_runtime.errors import AdapterRejected
from lora_runtime.types import Task


@dataclass(frozen=True, slots=True)
class Promises:
    """Checks the plans of all modules of one adapter against its config, and completes them."""

    planner: Planner
    plans: dict[str, ModulePlan]  # by module path
    refused: frozenset[str]  # modules whose tensors are there and wrong: they are not missing too
    prefix: str  # of the backbone in the task class that the adapter was trained on, with its dot

    @classmethod
    def of(cls, planner: Planner, plans: dict[str, ModulePlan], refused: frozenset[str]) -> Promises:
        inside = (plan for plan in plans.values() if plan.name in planner.base.modules)
        first = next(inside, None)
        return cls(planner, plans, refused, first.path.removesuffix(first.name) if first else "")

    def check(self) -> None:
        """Raise AdapterRejected for what is missing, and warn of biases that are."""
        attempt = self.planner.findings.attempt
        with attempt():
            self._check_tokens()
        with attempt():
            self._tie()
        for leaf in self._leaves():
            with attempt():
                self._check_leaf(leaf)
        with attempt():
            self._check_vocabulary()
        self._warn_of_biases()

    def _leaves(self) -> list[Leaf]:
        """The leaves that the adapter's task runs."""
        names = self.planner.base.leaves or self.planner.locator.sites
        leaves = [leaf for name in names if (leaf := self.planner.leaf(name)) is not None]
        return [leaf for leaf in leaves if not self.planner.is_unused(leaf)]

    def _full(self, name: str) -> str:
        """A module's path in the adapter's task class."""
        plan = self.plans.get(name)
        if plan is not None:
            return plan.path
        return self.prefix + name if name in self.planner.base.modules else name

    def _check_leaf(self, leaf: Leaf) -> None:
        if leaf.path in self.refused:
            return
        plan, targets = self.plans.get(leaf.path), self.planner.targets
        if plan is not None and plan.rank is not None:
            return
        full = self._full(leaf.path)
        if targets.saves(full) or self._is_saved_by_tying(leaf.path):
            self._check_saved(leaf, full, plan)
            return
        if leaf.kind is LeafKind.OTHER or (leaf.per_sequence and leaf.path != self.planner.output_path):
            return  # a task class may come without the pooler
        meant = leaf.kind is LeafKind.LINEAR and leaf.path != self.planner.output_path if targets.all_linear else True
        if (meant and targets.promises(full)) or self._is_adapted_by_tying(leaf.path):
            part = Part.EMBED_A if leaf.kind is LeafKind.EMBEDDING else Part.A
            self._missing(full, part.value, "target_modules", "names the module")

    def _check_saved(self, leaf: Leaf, full: str, plan: ModulePlan | None) -> None:
        given = set[str]() if plan is None else set(plan.replaced)
        for name in leaf.shapes:
            if name not in given and f"{leaf.path}.{name}" not in self.planner.head_params:
                self._missing(full, name, "modules_to_save", "names the module")

    def _missing(self, module: str, ending: str, field: str, why: str) -> NoReturn:
        where = f"{WEIGHTS_FILE} tensor {KEY_PREFIX}{module}.{ending}"
        raise AdapterRejected("MISSING_TENSOR", where, f"is missing; {field} of {CONFIG_FILE} {why}")

    # Trainable tokens

    def _check_tokens(self) -> None:
        indices = self.planner.config.trainable_token_indices
        named: set[str] = set()
        for plan in self.plans.values():
            if Part.TOKENS in plan.parts:
                name, plan.token_ids = self._token_ids(plan)
                named.add(name)
                self._check_rows(plan)
        if isinstance(indices, dict):
            tied = self._tied_names(set(indices))
            for name in sorted(indices.keys() - named - tied):
                if not any(path.endswith(name) for path in self.planner.unused):
                    self._missing(name, Part.TOKENS.value, "trainable_token_indices", "names the module")
        elif indices and not named:
            name = self._full(self.planner.base.word_embedding)
            self._missing(name, Part.TOKENS.value, "trainable_token_indices", "lists tokens")

    def _token_ids(self, plan: ModulePlan) -> tuple[str, tuple[int, ...]]:
        """(the name by which the config lists tokens of a module, their ids); the output layer follows tied words."""
        indices = self.planner.config.trainable_token_indices
        if isinstance(indices, dict):
            for name, ids in indices.items():
                if plan.path.endswith(name):
                    return name, tuple(ids)
            words = self.planner.base.word_embedding
            if self._follows_words(plan.name):
                return self._token_ids(replace(plan, name=words, path=self._full(words)))
        elif indices and (plan.name == self.planner.base.word_embedding or self._follows_words(plan.name)):
            return "", tuple(indices)
        message = f"is not expected; trainable_token_indices of {CONFIG_FILE} does not name the module"
        raise AdapterRejected("UNEXPECTED_TENSOR", plan.parts[Part.TOKENS].where, message)

    def _follows_words(self, name: str) -> bool:
        return self.planner.base.tied_output and name == self.planner.output_path

    def _tied_names(self, names: set[str]) -> set[str]:
        """Names of the output layer, which has no tokens of its own where the words' are its."""
        output = self.planner.output_path
        return {name for name in names if self._follows_words(output) and output.endswith(name)}

    def _check_rows(self, plan: ModulePlan) -> None:
        ref, ids = plan.parts[Part.TOKENS], plan.token_ids
        assert plan.leaf is not None
        width = plan.leaf.shapes["weight"][-1]
        if ref.shape != (len(ids), width):
            message = f"has shape {list(ref.shape)}, {[len(ids), width]} is needed by trainable_token_indices"
            ref.refuse("SHAPE_MISMATCH", message)
        if len(set(ids)) != len(ids):
            ref.refuse("CONFIG_INVALID", "has two rows for one token of trainable_token_indices")
        if plan.leaf.kind is LeafKind.LINEAR and "bias" in plan.leaf.shapes:
            ref.refuse("FEATURE_UNSUPPORTED", "replaces rows of a linear module whose bias PEFT would drop")
        beyond = {i for i in ids if i >= plan.table_rows}
        if not beyond:
            return
        whole = beyond == set(range(plan.table_rows, plan.table_rows + len(beyond)))
        if not whole or self.planner.head.task is Task.GENERATE:
            message = f"has token {max(beyond)}, the table {plan.table_rows} rows; save the resized embedding too"
            ref.refuse("SHAPE_MISMATCH", message)

    # Tied weights

    def _tie(self) -> None:
        """Where the output layer's weight is the word embedding's, PEFT changes both by what is not wrapped."""
        base, output = self.planner.base, self.planner.output_path
        if not base.tied_output or self.planner.head.task is not Task.GENERATE:
            return
        words, head = self.plans.get(base.word_embedding), self.plans.get(output)
        if words is not None and Part.TOKENS in words.parts:
            self._tie_tokens(words, head)
        if head is not None and head.copy is not None:  # PEFT loads it last, into the weight that both are
            words = self.plans.setdefault(base.word_embedding, self._plan_of(base.word_embedding))
            if "weight" not in words.params:
                words.copy = head.copy
        elif words is not None and words.copy is not None:
            head = self.plans.setdefault(output, self._plan_of(output))
            if "weight" not in head.params:
                head.copy, head.residual = words.copy, False
        if head is not None and head.residual:
            head.parts[Part.A].refuse(
                "FEATURE_UNSUPPORTED",
                "was trained on a changed output layer, whose weight is the word embedding's; save it converted to "
                "plain LoRA",
            )

    def _tie_tokens(self, words: ModulePlan, head: ModulePlan | None) -> None:
        indices = self.planner.config.trainable_token_indices
        if head is not None and Part.TOKENS in head.parts:
            return
        own = isinstance(indices, dict) and any(self.planner.output_path.endswith(name) for name in indices)
        if own and isinstance(indices, dict) and len({tuple(ids) for ids in indices.values()}) > 1:
            self._missing(self.planner.output_path, Part.TOKENS.value, "trainable_token_indices", "names the module")
        head = self.plans.setdefault(self.planner.output_path, self._plan_of(self.planner.output_path))
        if head.rank is not None:
            where = f"{CONFIG_FILE} field trainable_token_indices"
            message = "PEFT has no trainable tokens on a tied output layer that LoRA adapts; train one of them"
            raise AdapterRejected("VARIANT_CONFLICT", where, message)
        head.parts[Part.TOKENS], head.token_ids = words.parts[Part.TOKENS], words.token_ids

    def _plan_of(self, name: str) -> ModulePlan:
        return ModulePlan(name, self._full(name), self.planner.leaf(name))

    def _is_saved_by_tying(self, name: str) -> bool:
        words = self._full(self.planner.base.word_embedding)
        return self._is_tied_by_config(name) and self.planner.targets.saves(words)

    def _is_adapted_by_tying(self, name: str) -> bool:
        words = self.plans.get(self.planner.base.word_embedding)
        return self._is_tied_by_config(name) and words is not None and words.rank is not None

    def _is_tied_by_config(self, name: str) -> bool:
        return self.planner.config.ensure_weight_tying and self._follows_words(name)

    def _check_vocabulary(self) -> None:
        """A grown table needs an output layer as long."""
        base, output = self.planner.base, self.planner.output_path
        words, head = self.plans.get(base.word_embedding), self.plans.get(output)
        if self.planner.head.task is not Task.GENERATE or words is None or words.leaf is None:
            return
        rows = words.table_rows
        leaf = self.planner.leaf(output)
        own = head.table_rows if head is not None else leaf.shapes["weight"][0] if leaf else rows
        if rows > words.leaf.shapes["weight"][0] and own != rows:
            where = f"{WEIGHTS_FILE} tensor {KEY_PREFIX}{output}.weight"
            message = f"has {own} rows, the adapter's embedding {rows}; save both (save_embedding_layers)"
            raise AdapterRejected("MISSING_TENSOR", where, message)

    # Biases

    def _warn_of_biases(self) -> None:
        kind = self.planner.config.bias
        if kind == "none":
            return
        biased = [leaf for leaf in self._leaves() if "bias" in leaf.shapes]
        lacking = [leaf.path for leaf in biased if not self._has_bias(leaf, all_of=kind == "all")]
        if lacking:
            self.planner.findings.warn(
                f"bias of {CONFIG_FILE} is {kind!r}, but {len(lacking)} biases are missing ({lacking[0]}, …): "
                "the base's own are used, as PEFT would"
            )

    def _has_bias(self, leaf: Leaf, *, all_of: bool) -> bool:
        plan = self.plans.get(leaf.path)
        if not all_of and (plan is None or plan.rank is None):
            return True  # not asked for
        if f"{leaf.path}.bias" in self.planner.head_params:
            return True
        return plan is not None and "bias" in plan.replaced
