"""The nouns that every layer shares. No torch here, so that the scheduler can use them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from lora_runtime.device_memory import DeviceMemory
from lora_runtime.errors import AdapterFailed, InvalidRequest, MultiloraError, TaskMismatch
from lora_runtime.generation import Generated, Generation
from lora_runtime.prompts.spec import PromptSpec

DEFAULT_TENANT = "default"
BASE_NAME = "base"  # reserved: the base model without an adapter

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DEFAULT_ALIAS = "default"  # what a bare name follows
_RESOURCE = re.compile(r"tenants/([^/]+)/adapters/([^/]+)(?:/(versions|aliases)/([^/]+))?")


class Task(StrEnum):
    """What an adapter's head answers."""

    CLASSIFY = "classify"  # scores over labels for a text, or a pair of texts
    CLASSIFY_TOKENS = "classify_tokens"  # scores over labels for each token
    ANSWER = "answer"  # a span of a context (extractive question answering)
    EMBED = "embed"  # a vector of a text
    GENERATE = "generate"  # the next token


class Pooling(StrEnum):
    """How the hidden states of a text's tokens, special ones included, become one vector."""

    MEAN = "mean"
    CLS = "cls"  # the first token
    LAST = "last"


class ProblemType(StrEnum):
    """How logits of a classification become scores; the values are those of transformers' `problem_type`."""

    SINGLE_LABEL = "single_label_classification"  # softmax over labels
    MULTI_LABEL = "multi_label_classification"  # a sigmoid per label
    REGRESSION = "regression"  # the logit is the value


@dataclass(frozen=True, slots=True, order=True)
class AdapterId:
    """`tenant/name@version`. Versions are positive integers and immutable once registered."""

    tenant: str
    name: str
    version: int

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name("adapter", self.name)
        if self.version < 1:
            raise InvalidRequest("version", f"{self.version} is not a positive integer")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.version}"

    @property
    def resource_name(self) -> str:
        return f"tenants/{self.tenant}/adapters/{self.name}/versions/{self.version}"

    @property
    def is_base(self) -> bool:
        """Whether this is the base model itself: a reserved name that every tenant has and nobody registers."""
        return self.name == BASE_NAME


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A reference as a caller writes it: a version, or an alias, which is `default` for a bare name."""

    tenant: str
    name: str
    version: int | None
    alias: str = DEFAULT_ALIAS  # followed where `version` is None

    @classmethod
    def parse(cls, text: str, tenant: str = DEFAULT_TENANT) -> AdapterRef:
        """Parse `[tenant/]name[@version|@alias]` or `tenants/T/adapters/A[/versions/V|/aliases/L]`.

        `tenant` is the caller's own. Raises InvalidRequest on field `adapter` when `text` is none of these.
        """
        if resource := _RESOURCE.fullmatch(text):
            tenant, name, kind, tail = resource.groups()
        else:
            path, _, after = text.partition("@")
            tail = after if "@" in text else None
            own, _, name = path.rpartition("/")
            tenant = own or tenant
            kind = "aliases" if tail and is_alias_name(tail) else "versions"
        check_name("adapter", name)
        check_name("adapter", tenant)
        if tail is None:
            return cls(tenant, name, None)
        if kind == "aliases":
            check_alias_name("adapter", tail)
            return cls(tenant, name, None, tail)
        return cls(tenant, name, parse_version(tail))

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.tenant}/{self.name}@{self.version}"
        suffix = "" if self.alias == DEFAULT_ALIAS else f"@{self.alias}"
        return f"{self.tenant}/{self.name}{suffix}"


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable name of one adapter's versions; with a canary, a share of the requests goes to a second one."""

    tenant: str
    adapter: str
    name: str
    version: int
    canary_version: int | None = None
    canary_percent: float = 0.0  # of the requests, by their routing key
    previous_version: int | None = None  # before the last move

    @property
    def resource_name(self) -> str:
        return f"tenants/{self.tenant}/adapters/{self.adapter}/aliases/{self.name}"

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.name}"

    @property
    def versions(self) -> tuple[int, ...]:
        """The one or two versions it leads to."""
        return (self.version,) if self.canary_version is None else (self.version, self.canary_version)

    def choose(self, routing_key: str) -> int:
        """The version that answers requests with this key.

        The key's place between 0 and 100 does not depend on the percentage, so a canary that grows keeps its keys.
        """
        if self.canary_version is None:
            return self.version
        digest = hashlib.sha256(f"{self}\0{routing_key}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 * 100
        return self.canary_version if place < self.canary_percent else self.version


def is_alias_name(text: str) -> bool:
    """Whether `text` is a name that cannot be meant as a version."""
    return bool(_NAME.fullmatch(text)) and not text[0].isdigit()


def check_alias_name(field_name: str, value: str) -> None:
    """Raise InvalidRequest unless `value` is a name that begins with a letter."""
    if not is_alias_name(value):
        raise InvalidRequest(
            field_name, f"{value[:140]!r} is not an alias: 1 to 128 letters, digits, '.', '_' or '-', a letter first"
        )


def check_name(field_name: str, value: str) -> None:
    """Raise InvalidRequest unless `value` is 1 to 128 of letters, digits, '.', '_', '-' (no leading punctuation)."""
    if not _NAME.fullmatch(value):
        raise InvalidRequest(
            field_name,
            f"{value[:140]!r} is not a name: 1 to 128 letters, digits, '.', '_' or '-', a letter or digit first",
        )


def parse_version(text: str) -> int:
    """1 to 999999999 in plain digits; raises InvalidRequest on field `adapter` otherwise."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise InvalidRequest("adapter", f"version {text[:40]!r} is not a positive integer up to 999999999")
    return int(text)


@dataclass(frozen=True, slots=True)
class Site:
    """One base projection an adapter may adapt. `name` is the module path inside the backbone."""

    index: int
    name: str
    d_in: int
    d_out: int
    group: int  # index of its SiteGroup
    per_sequence: bool  # runs once per sequence (a pooler), hence in the head stage


@dataclass(frozen=True, slots=True)
class SiteGroup:
    """Sites fed by the same input, in call order; they share one shrink."""

    index: int
    d_in: int
    sites: tuple[Site, ...]


class AdapterState(StrEnum):
    """The highest tier an adapter has reached. Legal moves are the table in `residency.py`."""

    REGISTERED = "REGISTERED"  # known, nothing in memory
    FETCHING = "FETCHING"  # files are being read and validated
    HOST = "HOST"  # validated, in host memory, waiting for room on the device
    COPYING = "COPYING"  # being written into its run of the arena
    READY = "READY"  # published in the slot table
    DRAINING = "DRAINING"  # leaving; batches in flight still hold it
    FAILED = "FAILED"  # refused; the reason is kept


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What is known of an adapter without its weights: from its JSON files."""

    task: Task
    labels: tuple[str, ...] | None  # None until the head's row count is known, when the files name no labels
    problem_type: ProblemType
    max_length: int | None  # tokens, special ones included; None: what the base allows
    pad_token_id: int | None
    base_model_name: str | None  # a hint for people, never compared
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    pooling: Pooling | None = None  # of an EMBED adapter
    normalize: bool = False  # whether an EMBED adapter's vectors are divided by their length
    invocation_tokens: tuple[int, ...] | None = None  # aLoRA: active from the start of their last occurrence
    token_types: bool = True  # False: the second text of a pair has type 0 too, as in the adapter's training
    tokenizer_sha256: str | None = None  # over the files of the folder's own tokenizer; None: the base's is used
    num_token_ids: int | None = None  # rows of the embedding that it uses; None: not known
    second_task: Task | None = None  # GENERATE of the base itself where it is a decoder, which needs no head for either
    prompt: PromptSpec | None = None  # of a GENERATE adapter whose multilora.json says something of it


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter as others may see it: an immutable snapshot, replaced when anything changes."""

    id: AdapterId
    source: str  # a folder or a URL
    path: Path | None  # where its files lie; None while those of a URL are not fetched
    state: AdapterState
    card: AdapterCard | None  # None until its JSON files are read, and when they were refused
    digest: str | None = None  # SHA-256 over the content, known after the first load
    revision: str | None = None  # what a URL was pinned to
    failure: MultiloraError | None = None
    resident_bytes: int = 0  # bytes of the arena
    host_bytes: int = 0  # bytes of host memory beside it
    pinned: bool = False  # not evicted
    num_parameters: int = 0
    ranks: tuple[int, ...] = ()  # distinct, ascending
    load_seconds: float | None = None

    @property
    def is_read(self) -> bool:
        """Whether its JSON files have been read: it has a card, or was refused for lack of one."""
        return self.card is not None or self.failure is not None

    def card_for(self, task: Task) -> AdapterCard:
        """The card of an adapter that is asked for `task`; only of one that is read.

        Raises AdapterFailed where its JSON files were refused, TaskMismatch where it answers another task.
        """
        if self.card is None:
            assert self.failure is not None, f"{self.id} has not been read"
            raise AdapterFailed(str(self.id), self.failure)
        if task not in (self.card.task, self.card.second_task):
            raise TaskMismatch(str(self.id), task, self.card.task)
        return self.card


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The adapter after an unload or a deletion, and the bytes each tier got back."""

    info: AdapterInfo
    freed_bytes: int  # of the arena
    freed_host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One tokenised text, or text pair."""

    input_ids: tuple[int, ...]
    token_type_ids: tuple[int, ...] | None
    truncated: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Request:
    """One RPC: one adapter version, n sequences. Counts and permits are per sequence."""

    request_id: str
    adapter: AdapterId
    task: Task
    sequences: tuple[TokenSequence, ...]
    deadline_monotonic: float | None = None
    pooling: Pooling | None = None  # of an EMBED request; None: as the adapter says
    input_of: tuple[int, ...] | None = None  # per sequence the input it is a window of; None: one sequence an input
    tenant: str | None = None  # who asks, and is charged for it; None: the adapter's own tenant
    priority: int = 0  # among the requests of its tenant
    generation: Generation | None = None  # of a GENERATE request; None: the next token's logits are asked for

    @property
    def num_samples(self) -> int:
        """Of each sequence."""
        return 1 if self.generation is None else self.generation.params.n

    def input_index(self, sequence: int) -> int:
        """Which of the caller's inputs a sequence belongs to."""
        return sequence if self.input_of is None else self.input_of[sequence]


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one sequence, in the order of the adapter's labels: [num_labels] each."""

    logits: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenClassification:
    """The answer for one sequence: logits[token][label], tokens in order, special ones included."""

    logits: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class SpanLogits:
    """The answer for one window of a question and its context: per token, logits of a span's first and last token."""

    start: tuple[float, ...]
    end: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of one sequence, as pooled, not normalised."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class NextToken:
    """Logits of the token that follows one sequence, [vocabulary]."""

    logits: tuple[float, ...]


Output = Classification | TokenClassification | SpanLogits | Embedding | NextToken | Generated


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request inside the engine."""

    queue_s: float  # admitted until its first batch formed, without the wait for its adapter
    load_wait_s: float  # spent waiting for the adapter to become READY
    forward_s: float  # in batches that carried its sequences, first to last


@dataclass(frozen=True, slots=True)
class Result:
    """The terminal reply of a request; `outputs` follows the order of its sequences."""

    adapter: AdapterId
    digest: str
    card: AdapterCard  # of the weights that answered; labels are always set
    outputs: tuple[Output, ...]  # of the type of the request's task
    timings: Timings


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """What a runner did since it was made, for observers."""

    num_compiled: int = 0  # kernels, in this process; 0 for backends that compile none
    num_graphs: int = 0  # captured forward passes
    graph_bytes: int = 0  # of device memory that they took
    replayed_steps: int = 0
    eager_steps: Mapping[str, int] = field(default_factory=dict[str, int])  # that had no graph, by reason
    device_memory: DeviceMemory | None = None  # None where the device has none of its own: a CPU


@dataclass(frozen=True, slots=True)
class BatchStats:
    """One engine step, for observers."""

    num_sequences: int
    num_tokens: int
    num_adapters: int  # distinct, the base not counted
    forward_s: float
