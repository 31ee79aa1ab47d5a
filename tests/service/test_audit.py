"""The audit log: who did what to which adapter, and who was denied; one line each, and no text and no secret."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from server.pb.multilora.v1 import adapters_pb2 as pb
from server.tenancy.keys import utc_now
from server.tenancy.model import Role
from tests.service.fake_runtime import write_adapter
from tests.service.harness import classify_request
from tests.service.tenants import Caller, Door, code_of, guarded, make_door, request_for, until

SECRET_TEXT = "the patient's name is Miller"
CONFIG = b'{"labels": ["a", "b"]}'
NEWS = "tenants/acme/adapters/news"
FRESH = "tenants/acme/adapters/fresh/versions/1"
OWNER = (Role.INFER, Role.ADAPTERS)
KEYS = [("acme", "acme", OWNER), ("guest", "bolt", (Role.INFER,)), ("operator", "ops", (Role.OPERATOR,))]
Expected = tuple[str, str, str, str]  # method, target, outcome, reason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("acme/news/1", "acme/news/2", "acme/drafts/new"):
        write_adapter(tmp_path / "adapters" / folder, labels=["a", "b"])
    return tmp_path / "adapters"


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return make_door(tmp_path / "door")


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seen(path: Path) -> list[Expected]:
    found = lines(path)
    assert all([*line][:4] == ["time", "principal", "tenant", "method"] and line["peer"] for line in found)
    assert len({line["request_id"] for line in found}) == len(found)
    return [(line["method"].rpartition("/")[2], line["target"], line["outcome"], line["reason"]) for line in found]


def upload() -> list[pb.UploadAdapterRequest]:
    sha256 = hashlib.sha256(CONFIG).hexdigest()
    file = pb.UploadFile(path="adapter_config.json", num_bytes=len(CONFIG), sha256=sha256)
    header = pb.UploadHeader(name="sent", files=[file])
    return [pb.UploadAdapterRequest(header=header), pb.UploadAdapterRequest(data=CONFIG)]


async def test_each_action_is_one_line_about_its_adapter(root: Path, door: Door, tmp_path: Path) -> None:
    repeated = request_for("DeleteAdapter", "fresh@1", request_id="once")
    steps: list[tuple[str, Any, str]] = [
        ("RegisterAdapter", request_for("RegisterAdapter", "fresh", source="acme/drafts/new"), FRESH),
        ("UploadAdapter", upload(), "tenants/acme/adapters/sent/versions/1"),
        ("LoadAdapter", request_for("LoadAdapter", "news@2", wait=True), f"{NEWS}/versions/2"),
        ("PinAdapter", request_for("PinAdapter", "news", pinned=True), f"{NEWS}/versions/1"),
        ("PinAdapter", request_for("PinAdapter", "news"), f"{NEWS}/versions/1"),
        ("UnloadAdapter", request_for("UnloadAdapter", "news@2"), f"{NEWS}/versions/2"),
        ("SetAlias", request_for("SetAlias", "news"), f"{NEWS}/aliases/prod"),
        ("DeleteAlias", request_for("DeleteAlias", "news"), f"{NEWS}/aliases/prod"),
        ("DeleteAdapter", repeated, FRESH),
        ("DeleteAdapter", repeated, FRESH),
    ]
    log = tmp_path / "audit.jsonl"
    async with guarded(root, door, KEYS, audit_log=log, state=tmp_path / "state") as (_, callers):
        for method, request, _ in steps:
            await callers["acme"](method, request)
        await callers["acme"]("Classify", classify_request("news", "x"))  # no line: these change nothing
        await callers["acme"]("GetAdapter", request_for("GetAdapter", "news"))
        await callers["acme"]("ListAdapters", request_for("ListAdapters", tenant="acme"))
        await callers["operator"]("UnloadAdapter", request_for("UnloadAdapter", "acme/news"))
    assert seen(log) == [
        *((method, target, "OK", "") for method, _, target in steps),
        ("UnloadAdapter", f"{NEWS}/versions/1", "OK", ""),
    ]
    who = [(line["tenant"], line["principal"]) for line in lines(log)]
    ids = {key.tenant: key.id for key in door.keys.list()}
    assert who == [("acme", ids["acme"])] * len(steps) + [("ops", ids["ops"])]


async def test_each_failure_and_denial_is_one_line_about_what_was_asked_for(
    root: Path, door: Door, tmp_path: Path
) -> None:
    gone = "tenants/acme/adapters/gone"
    not_found = ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    denied = ("PERMISSION_DENIED", "PERMISSION_DENIED")
    steps: list[tuple[str, str, Any, str, tuple[str, str]]] = [
        ("acme", "DeleteAdapter", request_for("DeleteAdapter", "gone@3"), f"{gone}/versions/3", not_found),
        ("acme", "PinAdapter", request_for("PinAdapter", "gone@1"), f"{gone}/versions/1", not_found),
        ("acme", "LoadAdapter", request_for("LoadAdapter", "gone"), gone, not_found),
        ("acme", "SetAlias", request_for("SetAlias", "gone"), f"{gone}/aliases/prod", not_found),
        ("guest", "DeleteAdapter", request_for("DeleteAdapter", "acme/news@1"), f"{NEWS}/versions/1", denied),
        ("guest", "SetAlias", request_for("SetAlias", "acme/news"), NEWS, denied),
        ("guest", "RegisterAdapter", request_for("RegisterAdapter", "mine"), "tenants/bolt/adapters/mine", denied),
        ("guest", "ListAdapters", request_for("ListAdapters", tenant="acme"), "tenants/acme", denied),
        ("guest", "WatchAdapters", request_for("WatchAdapters", tenant="acme"), "tenants/acme", denied),
        ("guest", "GetUsage", request_for("GetUsage", tenant="acme"), "tenants/acme", denied),
        # for the caller it is not there; the operator sees that somebody tried
        ("guest", "Classify", classify_request("acme/news@1", "x"), f"{NEWS}/versions/1", not_found),
        ("guest", "GetAdapter", request_for("GetAdapter", "acme/news"), NEWS, not_found),
    ]
    log = tmp_path / "audit.jsonl"
    async with guarded(root, door, KEYS, audit_log=log) as (_, callers):
        for name, method, request, *_ in steps:
            await code_of(callers[name](method, request))
        assert await code_of(callers["guest"]("Classify", classify_request("gone", "x")))  # a slip: no line
    assert seen(log) == [(method, target, *outcome) for _, method, _, target, outcome in steps]


async def test_who_is_nobody_is_one_line_whatever_it_called(root: Path, door: Door, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    methods = ("Classify", "DeleteAdapter", "UploadAdapter", "WatchAdapters", "GetUsage")
    async with guarded(root, door, KEYS, audit_log=log) as (server, _):
        for method in methods:
            await code_of(Caller(server.channel, "Bearer ml_wrong")(method, request_for(method)))
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        await code_of(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()])).read())
    outcome = ("UNAUTHENTICATED", "UNAUTHENTICATED")
    assert seen(log) == [(method, "", *outcome) for method in (*methods, "ServerReflectionInfo")]
    assert {(line["principal"], line["tenant"]) for line in lines(log)} == {("", "")}


async def test_a_line_about_an_alias_says_where_it_leads(root: Path, door: Door, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    split = request_for("SetAlias", "news", version=2, canary_version=1, canary_percent=12.5)
    async with guarded(root, door, KEYS, audit_log=log) as (_, callers):
        acme = callers["acme"]
        await acme("SetAlias", request_for("SetAlias", "news", version=1))
        await acme("SetAlias", split)
        for _ in range(2):
            rollback = request_for("SetAlias", "news", version=0, rollback=True)
            await acme("SetAlias", rollback)
        await code_of(acme("SetAlias", request_for("SetAlias", "news", version=7)))
        await acme("DeleteAlias", request_for("DeleteAlias", "news"))
    assert [line["versions"] for line in lines(log)] == ["1", "2, canary 1 at 12.5%", "2", "1", "7", ""]


async def test_a_line_about_a_revoked_key_names_it(root: Path, door: Door, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    header = door.key("acme", *OWNER)
    key_id = header.split("_")[1]
    async with guarded(root, door, KEYS, audit_log=log) as (server, _):
        caller = Caller(server.channel, header)
        assert (await code_of(caller("GetUsage", request_for("GetUsage")))).name == "OK"
        door.keys.revoke(key_id, utc_now())

        async def is_denied() -> bool:
            return (await code_of(caller("GetUsage", request_for("GetUsage")))).name == "UNAUTHENTICATED"

        await until(is_denied)
        forged = Caller(server.channel, f"Bearer ml_{key_id}_{'Z' * 43}")  # an id alone proves nothing
        await code_of(forged("GetUsage", request_for("GetUsage")))
    assert [(line["key_id"], line["principal"]) for line in lines(log)] == [(key_id, ""), ("", "")]


async def test_no_text_and_no_secret_is_written_anywhere(
    root: Path, door: Door, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    log = tmp_path / "audit.jsonl"
    async with guarded(root, door, KEYS, audit_log=log) as (server, callers):
        acme = callers["acme"]
        forged = f"Bearer ml_{'a' * 12}_{'Z' * 43}"
        for caller in (
            *callers.values(),
            Caller(server.channel, forged),
            Caller(server.channel, f"Basic {SECRET_TEXT}"),
        ):
            for adapter in ("news", "acme/news", "ghost/news", SECRET_TEXT):
                request = classify_request(adapter, SECRET_TEXT, SECRET_TEXT * 50, routing_key=SECRET_TEXT)
                await code_of(caller("Classify", request))
                await code_of(caller("LoadAdapter", request_for("LoadAdapter", adapter)))
        metadata = (*acme.metadata, ("x-request-id", SECRET_TEXT))
        await code_of(server.adapters.LoadAdapter(request_for("LoadAdapter"), metadata=metadata))
    written = log.read_text() + caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert "LoadAdapter" in log.read_text()
    secrets = [header.split("_", 2)[2] for caller in callers.values() for _, header in caller.metadata]
    for secret in (SECRET_TEXT, "Miller", "Z" * 43, *secrets):
        assert secret not in written
