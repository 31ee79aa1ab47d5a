"""Settings of `multilora serve`: flags, else `MULTILORA_*` variables, else defaults; resolved once."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterRef

ENV_PREFIX = "MULTILORA_"
MIB = 1 << 20
_Port = Annotated[int, Field(ge=0, le=65535)]
_Count = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SettingsError(Exception):
    """A setting is missing or wrong; the message names the flag, the value's fault and the variable."""


class ServeSettings(BaseModel):
    """Everything `serve` can be told. A field's description is the help of its flag."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(
        min_length=1, description="The base model: a folder, a GGUF file, or a name on the Hugging Face hub."
    )
    gguf_file: str | None = Field(
        None,
        min_length=1,
        description="Name of a GGUF file in the base's folder or hub repository; its weights become fp32 at load.",
    )
    adapters: str = Field(
        min_length=1,
        description="Where the adapters are: a folder, or a URL such as s3://bucket/adapters. TENANT/ADAPTER/VERSION/, "
        "ADAPTER/VERSION/, or ADAPTER/ (version 1) below it. It is watched.",
    )
    state: Path | None = Field(
        None,
        description="Folder that keeps registrations, uploads, pins and aliases over restarts. Default: they are "
        "forgotten, and nothing can be uploaded.",
    )
    sources: tuple[str, ...] = Field(
        (),
        description="URL prefixes that clients may register adapters from, separated by commas, such as hf://org; in "
        "one with {tenant} each tenant has its own.",
    )
    auth: str = Field(
        min_length=1,
        description="Who may call: an auth file (TOML: keys, JWT, client certificates, limits), or `none` for anybody, "
        "which is allowed on loopback alone.",
    )
    tls_cert: Path | None = Field(None, description="PEM file of the server's certificate chain; turns TLS on.")
    tls_key: Path | None = Field(None, description="PEM file of its private key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of CAs; clients must then show a certificate of theirs."
    )
    audit_log: Path | None = Field(
        None, description="File that gets a JSON line for each change of adapters and each denial."
    )
    reflection: Literal["open", "authenticated", "off"] = Field(
        "authenticated", description="Who may list the services: anybody, callers with a credential, or nobody."
    )
    health: Literal["open", "authenticated"] = Field(
        "open", description="Who may ask for health: anybody, or callers with a credential."
    )
    refuse_early: bool = Field(
        True, description="Refuse requests whose deadline will pass in the queue, by the current pace."
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on for gRPC.")
    port: _Port = Field(50051, description="gRPC port; 0 takes any free one.")
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="Address of /metrics and probes: no credential, no TLS."
    )
    metrics_port: _Port = Field(9090, description="HTTP port of /metrics and probes; 0 takes any free one.")
    busiest_adapters: Annotated[int, Field(ge=1, le=1000)] = Field(
        20, description="Adapters with counters of their own in /metrics; all others are counted as `other`."
    )
    stall_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        60.0, description="Seconds without a turn of the engine's loop after which /livez fails."
    )
    preload: tuple[str, ...] = Field((), description="Adapters to load before serving, separated by commas.")
    threads: _Count | None = Field(
        None, description="Threads of one forward pass. Default: as many as torch finds cores."
    )
    device: str = Field("cpu", min_length=1, description="Where the base computes: cpu, cuda or cuda:N.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the base, its adapters and activations; a CPU serves float32."
    )
    lora_backend: str | None = Field(
        None, description="Kernels of the low-rank deltas, by name. Default: the device's fastest."
    )
    graph_mib: Annotated[int, Field(ge=0)] = Field(
        1024, description="MiB of device memory for CUDA graphs; 0: every step runs eagerly. For CUDA."
    )
    host_mib: _Count = Field(
        1024, description="MiB of page-locked host memory for adapters beside those on the device. For CUDA."
    )
    prepack: bool = Field(
        True, description="On a CPU, keep reordered copies of the base's weights: faster, and twice the memory."
    )
    quantize: Literal["none", "int8", "8bit", "4bit"] = Field(
        "none",
        description="The base's projections in fewer bits: int8 on a CPU with VNNI (hardly faster); 8bit, 4bit: CUDA.",
    )
    tokenizer_threads: _Count = Field(2, description="Threads that tokenise.")
    loader_threads: _Count = Field(1, description="Threads that read and validate adapters.")
    arena_mib: _Count = Field(512, description="MiB of memory for adapters; a sixteenth of it is for copies.")
    cache_mib: _Count = Field(4096, description="MiB of disk for the files of adapters that come from URLs.")
    max_upload_mib: _Count = Field(1024, description="MiB of the largest upload.")
    watch_seconds: _Seconds = Field(
        5.0, description="Seconds between two looks at the adapter folder; 0: only at start."
    )
    token_budget: _Count = Field(
        256, description="Most tokens in one batch; a longer text has one of its own. More: others wait longer for it."
    )
    beside_tokens: _Count = Field(
        48, description="Most tokens of other texts in a batch that goes on with generated ones. More: those falter."
    )
    max_batch_sequences: _Count = Field(256, description="Most sequences in one batch.")
    max_inputs: _Count = Field(256, description="Most inputs in one request.")
    max_input_chars: _Count = Field(
        262_144, description="Most characters of one text, question or context; more is refused before it is tokenised."
    )
    kv_mib: _Count = Field(
        1024, description="MiB of memory for keys and values of texts under way, and of prompts that may come again."
    )
    prefix_cache: bool = Field(
        True,
        description="Keep keys and values of prompts for later ones of the tenant and adapter that begin alike.",
    )
    max_new_tokens: _Count = Field(4096, description="Most tokens that a request may have generated for a sample.")
    stream_stall_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        30.0, description="Seconds that a stream of generated text waits for a client that does not read; then it ends."
    )
    max_queued_sequences: _Count = Field(
        4096, description="Most sequences inside the server; more is refused at once with RESOURCE_EXHAUSTED."
    )
    max_message_mib: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="MiB of the largest request.")
    grace: _Seconds = Field(10.0, description="Seconds that requests in flight get to finish after SIGTERM.")
    drain_delay: _Seconds = Field(
        0.0, description="Seconds between reporting NOT_SERVING and refusing requests, for routers to notice."
    )
    connection_age: _Seconds = Field(
        0.0,
        description="Seconds, about, after which a client is asked to connect anew, and so looks up addresses again; "
        "requests in flight are answered. 0: never.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="Lines of text, or of JSON; auto: JSON where stderr is no terminal."
    )
    access_log: Literal["all", "errors", "off"] = Field(
        "errors", description="Which RPCs get a line in the log, at level info: all, those that failed, or none."
    )

    @field_validator("preload", "sources", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("preload")
    @classmethod
    def _are_references(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for reference in value:
            try:
                AdapterRef.parse(reference)
            except InvalidRequest as error:
                raise ValueError(error.description) from error
        return value

    @field_validator("adapters", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("adapters")
    @classmethod
    def _is_a_folder_or_url(cls, value: str) -> str:
        if "://" not in value and not Path(value).is_dir():
            raise ValueError(f"{value} is not a folder")
        return value

    @field_validator("sources")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in value:
            scheme, mark, rest = prefix.partition("://")
            if not mark or not rest.strip("/") or scheme in ("file", "local", "reference"):
                raise ValueError(f"{prefix!r} is no URL prefix such as s3://bucket/adapters or hf://org")
        return value

    @field_validator("auth", mode="before")
    @classmethod
    def _auth_as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _is_guarded(self) -> ServeSettings:
        if self.auth == "none" and not is_loopback(self.host):
            raise ValueError(
                f"--auth none answers anybody, and --host {self.host} is not loopback: name an auth file, or listen on "
                "127.0.0.1"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: name both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key: there is no TLS without them")
        return self

    @model_validator(mode="after")
    def _largest_request_is_admissible(self) -> ServeSettings:
        if self.max_inputs > self.max_queued_sequences:
            raise ValueError(
                f"--max-queued-sequences {self.max_queued_sequences} is less than --max-inputs "
                f"{self.max_inputs}: the largest request could never be admitted"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def flag_of(setting: str) -> str:
    """The command-line flag of a setting."""
    return "--" + setting.replace("_", "-")


def resolve_settings(flags: Mapping[str, Any], environ: Mapping[str, str]) -> ServeSettings:
    """Settings from flags (None: not given) and variables (empty: not set).

    Raises SettingsError with one readable line per fault.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    variables = {
        name: value
        for name in ServeSettings.model_fields
        if name not in given and (value := environ.get(variable_of(name)))
    }
    try:
        return ServeSettings.model_validate({**variables, **given})
    except ValidationError as error:
        raise SettingsError(_describe(error, from_environment=set(variables))) from error


def _describe(error: ValidationError, from_environment: set[str]) -> str:
    """One line per fault: the place it was set, and what is wrong with it."""
    lines: list[str] = []
    for fault in error.errors(include_url=False, include_context=False):
        message = fault["msg"].removeprefix("Value error, ")
        if not fault["loc"]:
            lines.append(message)
            continue
        name = str(fault["loc"][0])
        if fault["type"] == "missing":
            what = ServeSettings.model_fields[name].description
            lines.append(f"{flag_of(name)} is required (or {variable_of(name)}). {what}")
        else:
            place = variable_of(name) if name in from_environment else flag_of(name)
            is_switch = fault["type"] == "bool_parsing"
            lines.append(f"{place}: {fault['input']!r} is neither yes nor no" if is_switch else f"{place}: {message}")
    return "\n".join(lines)
