"""The auth file: which credentials are accepted, what each tenant may use, and which adapters are shared.

AuthFileError          the auth file, or one that it names, cannot be used; the message says which, and what to do
├── KeyFileError       the file of API keys
└── JwksError          the JWKS, as a file or from its URL
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lora_runtime.errors import InvalidRequest, shown
from lora_runtime.types import check_name
from server.tenancy.model import Limits, Policy, Role

# What the keys of a JWKS can prove. None of them takes a secret, so a public key can never pass for one.
Algorithm: TypeAlias = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]  # fmt: skip
MIB = 1 << 20
_MAX_SHOWN_VALUE = 80


class AuthFileError(Exception):
    """A file of the auth configuration cannot be used; the message names file, key, value and remedy."""


class KeyFileError(AuthFileError):
    """The file of API keys cannot be read, written or understood."""


class JwksError(AuthFileError):
    """A JWKS cannot be fetched or understood."""


def _name(value: str) -> str:
    try:
        check_name("name", value)
    except InvalidRequest as error:
        raise ValueError(error.description) from error
    return value


def _owned_adapter(value: str) -> str:
    tenant, _, adapter = value.partition("/")
    try:
        check_name("tenant", tenant)
        check_name("adapter", adapter)
    except InvalidRequest as error:
        raise ValueError("is not TENANT/ADAPTER; all versions of an adapter are shared together") from error
    return value


def _limit(value: object) -> object:
    """`unlimited` lifts a limit of [default], which TOML, without a null, could not."""
    return None if value == "unlimited" else value


def _asymmetric(value: object) -> object:
    if isinstance(value, str) and (value.upper().startswith("HS") or value.lower() == "none"):
        raise ValueError("is not asymmetric, so whoever can check a token could forge one; use RS256, ES256 or EdDSA")
    return value


def _jwks(value: str) -> str:
    if "://" in value and not value.startswith("https://"):
        raise ValueError("must be a file or an https:// URL: what the wire can change proves nothing")
    return value


Name = Annotated[str, AfterValidator(_name)]
_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Rate = Annotated[
    Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None, BeforeValidator(_limit)
]  # fmt: skip
_Count = Annotated[Annotated[int, Field(ge=1, strict=True)] | None, BeforeValidator(_limit)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _KeysTable(_Table):
    file: Path


class JwtConfig(_Table):
    """[jwt]: whose tokens are accepted, and which claims say what."""

    jwks: Annotated[_Text, AfterValidator(_jwks)]  # a file, or an https:// URL
    issuer: _Text
    audience: _Text
    algorithms: Annotated[tuple[Annotated[Algorithm, BeforeValidator(_asymmetric)], ...], Field(min_length=1)]
    tenant_claim: _Text = "tenant"
    roles_claim: _Text = "roles"
    leeway: Annotated[float, Field(ge=0, le=600, strict=True)] = 30.0  # seconds the issuer's clock may differ

    @property
    def is_url(self) -> bool:
        return self.jwks.startswith("https://")


class MtlsConfig(_Table):
    """[mtls]: what a verified client certificate allows, and where it names its tenant."""

    roles: Annotated[frozenset[Role], Field(min_length=1)] = frozenset({Role.INFER})
    tenant_from: Literal["spiffe", "cn"] | None = None  # None: a SPIFFE URI, and without one the subject's CN
    trust_domain: _Text | None = None  # of SPIFFE URIs; None: whichever the client CA signs


class _LimitsTable(_Table):
    weight: Annotated[float, Field(gt=0, le=1000, strict=True)] = 1.0
    requests_per_second: _Rate = None
    tokens_per_minute: _Rate = None
    max_concurrent_requests: _Count = None
    max_queued_sequences: _Count = None
    max_resident_mib: _Count = None

    def limits(self) -> Limits:
        values = self.model_dump(exclude={"max_resident_mib"})
        mib = self.max_resident_mib
        return Limits(**values, max_resident_bytes=None if mib is None else mib * MIB)


class _ShareTable(_Table):
    adapter: Annotated[str, AfterValidator(_owned_adapter)]
    tenants: Annotated[tuple[Name, ...], Field(alias="with", min_length=1)]


class _AuthTables(_Table):
    keys: _KeysTable | None = None
    jwt: JwtConfig | None = None
    mtls: MtlsConfig | None = None
    default: _LimitsTable = _LimitsTable()
    tenants: Mapping[Name, _LimitsTable] = Field(default_factory=dict[str, _LimitsTable])
    share: tuple[_ShareTable, ...] = ()


@dataclass(frozen=True, slots=True)
class AuthConfig:
    """An auth file, resolved: paths are absolute, tenants have the limits of [default] that they do not set."""

    path: Path
    keys_file: Path | None
    jwt: JwtConfig | None
    mtls: MtlsConfig | None
    policy: Policy


def load_auth_file(path: Path) -> AuthConfig:
    """Read and check an auth file. Raises AuthFileError with one line per fault."""
    data = _read_toml(path)
    try:
        tables = _AuthTables.model_validate(data)
    except ValidationError as error:
        raise AuthFileError("\n".join(_describe(path, fault) for fault in error.errors(include_url=False))) from error
    if tables.keys is tables.jwt is tables.mtls is None:
        raise AuthFileError(f"{path}: accepts no credential, so nobody could call; add [keys], [jwt] or [mtls]")
    folder = path.absolute().parent
    jwt = tables.jwt
    if jwt is not None and not jwt.is_url:
        jwt = jwt.model_copy(update={"jwks": str(folder / jwt.jwks)})
    keys_file = None if tables.keys is None else folder / tables.keys.file
    return AuthConfig(path.absolute(), keys_file, jwt, tables.mtls, _policy(tables))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AuthFileError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from error
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise AuthFileError(f"{path}: is not TOML: {error}") from error


def _policy(tables: _AuthTables) -> Policy:
    limits = {
        name: tables.default.model_copy(update={key: getattr(table, key) for key in table.model_fields_set}).limits()
        for name, table in tables.tenants.items()
    }
    shared: dict[tuple[str, str], frozenset[str]] = {}
    for share in tables.share:
        owner, _, adapter = share.adapter.partition("/")
        shared[owner, adapter] = shared.get((owner, adapter), frozenset()) | frozenset(share.tenants)
    return Policy(tables.default.limits(), limits, shared)


def _describe(path: Path, fault: Any) -> str:
    """One fault as `file: key = value: what is wrong`."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{path}: {key} is required"
    if fault["type"] == "extra_forbidden":
        return f"{path}: {key} is not a key of an auth file; correct or remove it"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {key} = {_value(fault['input'])}: {message}"


def _value(value: object) -> str:
    text = shown(repr(value))
    return text if len(text) <= _MAX_SHOWN_VALUE else text[: _MAX_SHOWN_VALUE - 1] + "…"
