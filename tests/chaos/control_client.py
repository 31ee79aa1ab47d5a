"""A client that changes one adapter at random, and knows what it must find: what was acknowledged, and nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from server.pb.multilora.v1 import adapters_pb2 as pb
from tests.service.harness import classify_request

CONTENTS = ("seed0", "seed1")  # folders of the adapter root
_MAX_VERSIONS = 5
_PIECE = 10_000
_SERVER_IS_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)


@dataclass(frozen=True)
class Version:
    content: str  # one of CONTENTS
    uploaded: bool
    pinned: bool = False


@dataclass(frozen=True)
class Lead:
    """Where an alias leads."""

    version: int
    canary_version: int = 0
    previous_version: int = 0


@dataclass(frozen=True)
class Known:
    """One adapter, as a client knows it."""

    versions: dict[int, Version] = field(default_factory=dict[int, Version])
    aliases: dict[str, Lead] = field(default_factory=dict[str, Lead])

    def with_version(self, number: int, version: Version) -> Known:
        first = {} if self.aliases else {"default": Lead(number)}
        return Known({**self.versions, number: version}, {**first, **self.aliases})

    def without_version(self, number: int) -> Known:
        left = {known: version for known, version in self.versions.items() if known != number}
        return Known(left, self.aliases if left else {})

    def with_alias(self, name: str, lead: Lead) -> Known:
        before = self.aliases.get(name)
        previous = 0 if before is None else before.previous_version
        if before is not None and before.version != lead.version:
            previous = before.version
        return replace(self, aliases={**self.aliases, name: replace(lead, previous_version=previous)})

    def without_alias(self, name: str) -> Known:
        return replace(self, aliases={known: lead for known, lead in self.aliases.items() if known != name})

    def is_removable(self, number: int) -> bool:
        leading = {name for name, lead in self.aliases.items() if number in (lead.version, lead.canary_version)}
        return not self.versions[number].pinned and (
            not leading or (leading == {"default"} and len(self.versions) == 1)
        )


@dataclass(frozen=True)
class Change:
    """A call that may be sent again, and what is there after it."""

    method: str
    request: Any
    after: Known


class ControlClient:
    """Owns the adapter `name`; calls follow each other, so at most one is in doubt when the server dies."""

    def __init__(self, name: str, root: Path, rng: random.Random) -> None:
        self.name = name
        self.known = Known()
        self.in_doubt: Change | None = None
        self.num_acknowledged = 0
        self.contents = {content: files_of(root / content) for content in CONTENTS}
        self._rng = rng

    async def storm(self, adapters: Any) -> None:
        """Change without pause until the server is gone."""
        try:
            while True:
                self.in_doubt = self._next()
                await self._send(adapters, self.in_doubt)
                self.known, self.in_doubt = self.in_doubt.after, None
                self.num_acknowledged += 1
        except aio.AioRpcError as error:
            if error.code() not in _SERVER_IS_GONE:
                raise

    async def check(self, adapters: Any) -> None:
        """What was acknowledged is there; the call in doubt was done wholly or not at all, and now is done."""
        allowed = [self.known] if self.in_doubt is None else [self.known, self.in_doubt.after]
        await self._until_found(adapters, allowed)
        if self.in_doubt is not None:
            await self._send(adapters, self.in_doubt)
            self.known, self.in_doubt = self.in_doubt.after, None
            await self._until_found(adapters, [self.known])

    async def check_answers(self, inference: Any, digests: dict[str, str]) -> None:
        """Every version answers with its own weights, and a bare name with one of its alias."""
        for number, version in self.known.versions.items():
            reply = await inference.Classify(classify_request(f"{self.name}@{number}", "a text"))
            assert (reply.version, reply.digest) == (number, digests[version.content])
        for name, lead in self.known.aliases.items():
            reply = await inference.Classify(classify_request(f"{self.name}@{name}", "a text"))
            assert reply.version in (lead.version, lead.canary_version)

    def stored_files(self) -> dict[str, bytes]:
        """What of this adapter must lie in the state directory, below `adapters`, by path."""
        return {
            f"{self.name}/{number}/{path}": data
            for number, version in self.known.versions.items()
            if version.uploaded
            for path, data in self.contents[version.content].items()
        }

    async def _until_found(self, adapters: Any, allowed: list[Known]) -> None:
        """Pins are loaded again while the server already answers."""
        found = None
        for _ in range(100):
            if (found := await self._find(adapters, allowed[-1])) in allowed:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{self.name}: found {found}, allowed {allowed}")

    async def _find(self, adapters: Any, like: Known) -> Known:
        """What the server knows; of a version's content it only tells whether it was uploaded."""
        tenant, _, name = self.name.partition("/")
        page = await adapters.ListAdapters(pb.ListAdaptersRequest(tenant=tenant, name_prefix=name))
        versions: dict[int, Version] = {}
        for adapter in page.adapters:
            uploaded = adapter.source == "upload"
            expected = like.versions.get(adapter.version) or self.known.versions.get(adapter.version)
            content = expected.content if uploaded and expected else adapter.source
            versions[adapter.version] = Version(content, uploaded, adapter.pinned)
        if not versions:
            return Known()
        reply = await adapters.GetAdapter(pb.GetAdapterRequest(adapter=f"{self.name}@{min(versions)}"))
        leads = {
            alias.name.rpartition("/")[2]: Lead(alias.version, alias.canary_version, alias.previous_version)
            for alias in reply.aliases
        }
        return Known(versions, leads)

    async def _send(self, adapters: Any, change: Change) -> None:
        request = iter(change.request) if change.method == "UploadAdapter" else change.request
        await getattr(adapters, change.method)(request, timeout=30)

    def _next(self) -> Change:
        """A call that the server must accept."""
        known, identity = self.known, uuid.uuid4().hex
        makers = [self._register, self._upload] if len(known.versions) < _MAX_VERSIONS else []
        if known.versions:
            makers += [self._pin, self._set_alias, self._set_alias]
        if any(map(known.is_removable, known.versions)):
            makers += [self._delete, self._delete]
        if known.aliases.keys() - {"default"}:
            makers += [self._delete_alias]
        return self._rng.choice(makers)(identity)

    def _register(self, identity: str) -> Change:
        content = self._rng.choice(CONTENTS)
        request = pb.RegisterAdapterRequest(name=self.name, source=content, request_id=identity)
        return Change("RegisterAdapter", request, self._with_new(Version(content, uploaded=False)))

    def _upload(self, identity: str) -> Change:
        content = self._rng.choice(CONTENTS)
        sent = [*upload_messages(self.name, self.contents[content], identity)]
        return Change("UploadAdapter", sent, self._with_new(Version(content, uploaded=True)))

    def _with_new(self, version: Version) -> Known:
        return self.known.with_version(max(self.known.versions, default=0) + 1, version)

    def _pin(self, identity: str) -> Change:
        number, version = self._rng.choice([*self.known.versions.items()])
        pinned = not version.pinned
        request = pb.PinAdapterRequest(adapter=f"{self.name}@{number}", pinned=pinned, request_id=identity)
        return Change("PinAdapter", request, self.known.with_version(number, replace(version, pinned=pinned)))

    def _set_alias(self, identity: str) -> Change:
        alias, version = self._rng.choice(("default", "prod", "test")), self._rng.choice([*self.known.versions])
        others = [number for number in self.known.versions if number != version]
        canary = self._rng.choice(others) if others and self._rng.random() < 0.3 else 0
        request = pb.SetAliasRequest(
            adapter=self.name, alias=alias, version=version, canary_version=canary, request_id=identity,
            canary_percent=10.0 if canary else 0.0,
        )  # fmt: skip
        return Change("SetAlias", request, self.known.with_alias(alias, Lead(version, canary)))

    def _delete_alias(self, identity: str) -> Change:
        alias = self._rng.choice(sorted(self.known.aliases.keys() - {"default"}))
        request = pb.DeleteAliasRequest(adapter=self.name, alias=alias, request_id=identity)
        return Change("DeleteAlias", request, self.known.without_alias(alias))

    def _delete(self, identity: str) -> Change:
        number = self._rng.choice([number for number in self.known.versions if self.known.is_removable(number)])
        request = pb.DeleteAdapterRequest(adapter=f"{self.name}@{number}", request_id=identity)
        return Change("DeleteAdapter", request, self.known.without_version(number))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def upload_messages(name: str, files: dict[str, bytes], identity: str) -> Iterator[pb.UploadAdapterRequest]:
    declared = [
        pb.UploadFile(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    ]
    yield pb.UploadAdapterRequest(header=pb.UploadHeader(name=name, files=declared, request_id=identity))
    data = b"".join(files.values())
    for at in range(0, len(data), _PIECE):
        yield pb.UploadAdapterRequest(data=data[at : at + _PIECE])
