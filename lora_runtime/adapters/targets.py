"""PEFT's own rule for which modules a config promises (`check_target_module_exists` and `_set_trainable`)."""

from __future__ import annotations

from typing import Any

from lora_runtime.adapters.config import CONFIG_FILE, LoraConfig
from lora_runtime.adapters.patterns import MAX_PATTERN_CHARS, Patterns

ALL_LINEAR = "all-linear"
_MAX_TARGET_CHARS = 100 * MAX_PATTERN_CHARS  # trainers list every module in one alternation


class Targets:
    """What `target_modules` and the fields that narrow it say of a module, by its path in the task class."""

    def __init__(self, config: LoraConfig) -> None:
        self._config = config
        self._targets = _Names("target_modules", config.target_modules or [])
        self._excluded = _Names("exclude_modules", config.exclude_modules or [])
        self._saved = Patterns(CONFIG_FILE, "modules_to_save")
        self._saved.refuse_more_than(len(config.modules_to_save))
        template = r"(^|.*\.){}($|\..*)"
        self._saved_patterns = [self._saved.compile(name, template) for name in config.modules_to_save]
        self._layers = _Layers(config)

    @property
    def all_linear(self) -> bool:
        """Whether every linear module of the backbone is meant."""
        target = self._config.target_modules
        return isinstance(target, str) and target.lower() == ALL_LINEAR

    def promises(self, module: str) -> bool:
        """Whether PEFT would adapt the module; of "all-linear", whether nothing excludes it."""
        if not self.all_linear and not self._targets.name(module):
            return False
        if self._excluded.name(module):
            return False
        if any(self._saved.match(pattern, module) for pattern in self._saved_patterns):
            return False
        return isinstance(self._config.target_modules, str) or self._layers.contain(module)

    def saves(self, module: str) -> bool:
        """Whether the module, or one that holds it, is to be saved whole: PEFT compares ends, without a dot."""
        names = tuple(self._config.modules_to_save)
        while names and module:
            if module.endswith(names):
                return True
            module = module.rpartition(".")[0]
        return False


class _Names:
    """A list of path suffixes, or one regular expression of whole paths."""

    def __init__(self, field: str, names: list[str] | str) -> None:
        self._patterns = Patterns(CONFIG_FILE, field)
        self._pattern: Any = None
        self._exact: frozenset[str] = frozenset()
        if isinstance(names, str):
            if names.lower() != ALL_LINEAR:
                self._pattern = self._patterns.compile(names, max_chars=_MAX_TARGET_CHARS)
        else:
            self._patterns.refuse_more_than(len(names))
            self._exact = frozenset(names)

    def name(self, module: str) -> bool:
        if self._pattern is not None:
            return bool(self._patterns.match(self._pattern, module, whole=True))
        while module:
            if module in self._exact:
                return True
            module = module.partition(".")[2]
        return False


class _Layers:
    """`layers_to_transform` and `layers_pattern`: the indices of layers, found in module paths."""

    def __init__(self, config: LoraConfig) -> None:
        layers = config.layers_to_transform
        self._indices = frozenset([layers] if isinstance(layers, int) else layers or ())
        self._patterns = Patterns(CONFIG_FILE, "layers_pattern")
        given = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        self._patterns.refuse_more_than(len(given or ()))
        if given:
            template = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
            self._compiled = [self._patterns.compile(pattern, template) for pattern in given]
        else:
            self._compiled = [self._patterns.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]

    def contain(self, module: str) -> bool:
        if not self._indices:
            return True
        matches = (self._patterns.match(pattern, module) for pattern in self._compiled)
        found = next((match for match in matches if match), None)
        return found is not None and int(found["idx"]) in self._indices
