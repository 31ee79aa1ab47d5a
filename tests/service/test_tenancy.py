"""Who may call what, as callers see it: credentials of three kinds, roles, and files that change under a server."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.pb.multilora.v1 import adapters_pb2 as pb
from server.settings import SettingsError, resolve_settings
from server.tenancy.keys import utc_now
from server.tenancy.model import Role
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, failure_of
from tests.service.tenants import (
    CHANGES,
    INFERENCE,
    METHODS,
    Caller,
    Door,
    code_of,
    guarded,
    make_door,
    reflection_code,
    request_for,
    until,
)
from tests.unit.tenancy_tokens import AUDIENCE, ISSUER, claims, ec_key, hand_made, jwk_of, jwks, rsa_key, token

JWT = "\n".join(
    (
        "[jwt]",
        'jwks = "jwks.json"',
        f'issuer = "{ISSUER}"',
        f'audience = "{AUDIENCE}"',
        'algorithms = ["RS256", "ES256"]',
        "leeway = 0.0",
    )
)
DENIED = grpc.StatusCode.UNAUTHENTICATED
OK = grpc.StatusCode.OK
FORBIDDEN = grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("acme/news/1", "acme/news/2", "acme/spare/1"):
        write_adapter(tmp_path / "adapters" / folder, labels=["a", "b"])
    return tmp_path / "adapters"


@pytest.fixture
def door(tmp_path: Path) -> Door:
    door = make_door(tmp_path / "door", JWT)
    (door.folder / "jwks.json").write_bytes(jwks(jwk_of(rsa_key(), "rsa")))
    return door


@pytest.fixture
async def server(root: Path, door: Door, tmp_path: Path) -> AsyncGenerator[Harness]:
    async with guarded(root, door, [], state=tmp_path / "state") as (harness, _):
        yield harness


def bad_headers(door: Door) -> dict[str, tuple[str, ...]]:
    """What callers send that are nobody."""
    now = utc_now()
    good = door.key("acme", *Role)
    expired = door.key("acme", *Role, expires=now - datetime.timedelta(seconds=1))
    revoked = door.key("acme", *Role)
    door.keys.revoke(revoked.split("_")[1], now)
    other = door.key("acme", *Role)
    past = int(now.timestamp()) - 5
    return {
        "nothing": (),
        "empty": ("",),
        "no scheme": (good.removeprefix("Bearer "),),
        "another scheme": (good.replace("Bearer", "Basic"),),
        "no token": ("Bearer ",),
        "two headers": (good, good),
        "an expired key": (expired,),
        "a revoked key": (revoked,),
        "another key's secret": ("_".join((*good.split("_", 2)[:2], other.split("_", 2)[2])),),
        "a key cut short": (good[:-1],),
        "a key made up": ("Bearer ml_" + "a" * 12 + "_" + "b" * 43,),
        "far too long": ("Bearer " + "a" * 4_000,),
        "an expired JWT": (f"Bearer {token(exp=past)}",),
        "a JWT of another's key": (f"Bearer {token(ec_key(), 'rsa', 'ES256')}",),
        "a JWT of an unknown key": (f"Bearer {token(ec_key(), 'ec', 'ES256')}",),
        "a JWT for others": (f"Bearer {token(aud='others')}",),
        "a JWT of others": (f"Bearer {token(iss='https://evil.example')}",),
        "a JWT without tenant": (f"Bearer {token(tenant=None)}",),
        "a JWT of no tenant": (f"Bearer {token(tenant='a b')}",),
        "an unsigned JWT": (f"Bearer {hand_made({'alg': 'none'}, claims(), None)}",),
        "a JWT signed with a public key": (f"Bearer {hand_made({'alg': 'HS256', 'kid': 'rsa'}, claims(), b'n')}",),
        "no JWT": ("Bearer a.b.c",),
    }


async def test_who_is_nobody_gets_one_answer_from_every_method(server: Harness, door: Door) -> None:
    bad = bad_headers(door)
    probe = Caller(server.channel, door.key("acme"))
    await until(lambda: is_known(probe))  # by then all keys are read
    answers: set[tuple[Any, ...]] = set()
    for why, headers in bad.items():
        caller = Caller(server.channel, *headers)
        for method in METHODS:
            failure = await failure_of(caller(method, request_for(method)))
            assert failure.code is DENIED, (why, method)
            facts = failure.info.reason, failure.message, str(failure.info.metadata), failure.field
            answers.add((*facts, failure.retry_after_s, failure.quota))
    assert len(answers) == 1, answers
    assert server.engine.submitted == server.engine.prefetched == []


async def is_known(caller: Caller) -> bool:
    return await code_of(caller("GetUsage", request_for("GetUsage"))) is OK


async def test_a_wrong_request_of_nobody_is_not_looked_at(server: Harness) -> None:
    for method in ("Classify", "RegisterAdapter", "WatchAdapters"):
        service = "InferenceService" if method == "Classify" else "AdapterService"
        path = f"/multilora.v1.{service}/{method}"
        many = server.channel.unary_stream if method == "WatchAdapters" else server.channel.unary_unary
        call: Any = many(path)(b"\xff\xff\xff")
        assert await code_of(call.read() if method == "WatchAdapters" else call) is DENIED


async def test_an_upload_of_nobody_is_refused_before_its_bytes(server: Harness) -> None:
    async def endless() -> AsyncIterator[pb.UploadAdapterRequest]:
        while True:
            yield pb.UploadAdapterRequest(data=b"x" * 1000)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(5):
        assert await code_of(Caller(server.channel).start("UploadAdapter", endless())) is DENIED


async def test_keys_and_tokens_say_whose_adapters_a_bare_name_means(server: Harness, door: Door) -> None:
    callers = [
        Caller(server.channel, door.key("acme", Role.INFER)),
        Caller(server.channel, f"Bearer {token(roles=['infer'])}"),
        Caller(server.channel, f"bearer {token(roles='openid infer')}"),
    ]
    await until(lambda: is_known(callers[0]))
    for caller in callers:
        reply = await caller("Classify", classify_request("news", "x"))
        assert reply.adapter == "tenants/acme/adapters/news/versions/1"
    assert {request.tenant for request in server.engine.submitted} == {"acme"}


FORBIDDEN_TO = {
    (Role.INFER,): CHANGES,
    (Role.ADAPTERS,): INFERENCE,
    (Role.INFER, Role.ADAPTERS): (),
    (Role.OPERATOR,): (),
}


@pytest.mark.parametrize("roles", FORBIDDEN_TO, ids=str)
async def test_a_role_allows_what_it_is_for(server: Harness, door: Door, roles: tuple[Role, ...]) -> None:
    caller = Caller(server.channel, door.key("acme", *roles))
    await until(lambda: is_known(caller))
    before = server.engine.catalogue.all(), server.engine.catalogue.aliases()
    for method in METHODS:
        code = await code_of(caller(method, request_for(method, "absent" if method in CHANGES else "news")))
        assert (code is FORBIDDEN) == (method in FORBIDDEN_TO[roles]), method
        assert code is not DENIED
    if roles == (Role.INFER,):
        for spelling in ("news", "news@1", "ghost/news", "", "bad name", "base"):  # the role is looked at first
            for method in CHANGES:
                failure = await failure_of(caller(method, request_for(method, spelling)))
                assert failure.code is FORBIDDEN, (method, spelling)
                assert (failure.info.reason, dict(failure.info.metadata)) == ("PERMISSION_DENIED", {"role": "adapters"})
    assert len(server.engine.catalogue.all()) == len(before[0])
    assert [alias.version for alias in server.engine.catalogue.aliases()] == [alias.version for alias in before[1]]


async def test_changes_of_keys_apply_without_a_restart(server: Harness, door: Door) -> None:
    header = door.key("acme")
    caller = Caller(server.channel, header)
    await until(lambda: is_known(caller))
    door.keys.revoke(header.split("_")[1], utc_now())
    await until(lambda: is_denied(caller))


async def is_denied(caller: Caller) -> bool:
    return await code_of(caller("GetUsage", request_for("GetUsage"))) is DENIED


async def test_a_stream_ends_when_its_key_is_revoked(server: Harness, door: Door) -> None:
    """Nothing more is told to it, though it began when the key was good."""
    header = door.key("acme")
    watcher, owner = Caller(server.channel, header), Caller(server.channel, door.key("acme", Role.ADAPTERS))
    await until(lambda: is_known(watcher))
    await until(lambda: is_known(owner))
    stream = watcher.start("WatchAdapters", pb.WatchAdaptersRequest())
    while not (await stream.read()).snapshot_complete:
        pass
    door.keys.revoke(header.split("_")[1], utc_now())
    await until(lambda: is_denied(watcher))
    await owner("LoadAdapter", pb.LoadAdapterRequest(adapter="news", wait=True))
    async with asyncio.timeout(5):
        assert (await failure_of(stream.read())).code is DENIED


async def test_a_stream_without_events_ends_when_its_key_is_revoked(
    server: Harness, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rpc.interceptors.CHECK_AGAIN_S", 0.05)
    header = door.key("acme")
    watcher = Caller(server.channel, header)
    await until(lambda: is_known(watcher))
    stream = watcher.start("WatchAdapters", pb.WatchAdaptersRequest())
    while not (await stream.read()).snapshot_complete:
        pass
    waiting = asyncio.ensure_future(stream.read())
    assert not (await asyncio.wait({waiting}, timeout=0.2))[0], "a good key is left alone"
    door.keys.revoke(header.split("_")[1], utc_now())
    async with asyncio.timeout(5):
        assert (await failure_of(waiting)).code is DENIED


async def test_an_upload_ends_when_its_key_is_revoked(server: Harness, door: Door) -> None:
    header = door.key("acme", Role.INFER, Role.ADAPTERS)
    caller = Caller(server.channel, header)
    await until(lambda: is_known(caller))
    content = b'{"labels": ["a", "b"]}'
    file = pb.UploadFile(path="adapter_config.json", num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    async def messages() -> AsyncIterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=pb.UploadHeader(name="sent", files=[file]))
        yield pb.UploadAdapterRequest(data=content[:5])
        door.keys.revoke(header.split("_")[1], utc_now())
        await until(lambda: is_denied(caller))
        yield pb.UploadAdapterRequest(data=content[5:])

    assert await code_of(caller.start("UploadAdapter", messages())) is DENIED
    assert "sent" not in str(server.engine.catalogue.all())


async def test_changes_of_the_auth_file_and_of_issuer_keys_apply_without_a_restart(server: Harness, door: Door) -> None:
    by_key, by_token = Caller(server.channel, door.key("acme")), Caller(server.channel, f"Bearer {token()}")
    await until(lambda: is_known(by_key))
    assert await is_known(by_token)
    (door.folder / "jwks.json").write_bytes(jwks(jwk_of(ec_key(), "ec")))
    await until(lambda: is_denied(by_token))
    renewed = Caller(server.channel, f"Bearer {token(ec_key(), 'ec', 'ES256')}")
    assert await is_known(renewed)
    door.write()  # no JWT any more
    await until(lambda: is_denied(renewed))
    assert await is_known(by_key)
    door.auth.write_text("[keys\n")  # broken: what was read before stays
    await asyncio.sleep(0.1)
    assert await is_known(by_key)
    door.write(JWT)
    await until(lambda: is_known(renewed))


async def test_sharing_and_its_end_apply_without_a_restart(server: Harness, door: Door) -> None:
    guest = Caller(server.channel, door.key("bolt"))
    await until(lambda: is_known(guest))

    async def may_ask() -> bool:
        return await code_of(guest("Classify", classify_request("acme/news", "x"))) is OK

    assert not await may_ask()
    door.write(JWT, '[[share]]\nadapter = "acme/news"\nwith = ["bolt"]')
    await until(may_ask)
    door.write(JWT)
    async with asyncio.timeout(10):
        while await may_ask():
            await asyncio.sleep(0.01)


async def health_code(server: Harness, *headers: str, watch: bool = False) -> grpc.StatusCode:
    stub: Any = health_pb2_grpc.HealthStub(server.channel)
    metadata = tuple(("authorization", header) for header in headers)
    if not watch:
        return await code_of(stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata))
    call = stub.Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
    code = await code_of(call.read())
    call.cancel()
    return code


@pytest.mark.parametrize("watch", [False, True], ids=["Check", "Watch"])
async def test_health_is_open_or_asks_for_a_credential(root: Path, door: Door, watch: bool) -> None:
    header = door.key("acme")
    async with guarded(root, door, []) as (server, _):
        assert await health_code(server, watch=watch) is OK
        assert await health_code(server, "Bearer wrong", watch=watch) is OK
    async with guarded(root, door, [], health="authenticated") as (server, _):
        assert await health_code(server, watch=watch) is DENIED
        assert await health_code(server, "Bearer wrong", watch=watch) is DENIED
        assert await health_code(server, header, watch=watch) is OK
        stub: Any = health_pb2_grpc.HealthStub(server.channel)
        unknown = stub.Check(health_pb2.HealthCheckRequest(service="absent"), metadata=(("authorization", header),))
        assert await code_of(unknown) is grpc.StatusCode.NOT_FOUND
        denied = await failure_of(stub.Check(health_pb2.HealthCheckRequest()))
        assert denied.message == (await failure_of(Caller(server.channel)("GetUsage", request_for("GetUsage")))).message


async def test_reflection_asks_for_a_credential_or_is_open_or_off(root: Path, door: Door) -> None:
    header = door.key("acme")
    for chosen, nobody, known in (
        ("authenticated", DENIED, OK),
        ("open", OK, OK),
        ("off", grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNIMPLEMENTED),
    ):
        async with guarded(root, door, [], reflection=chosen) as (server, _):
            assert await reflection_code(server.channel) is nobody, chosen
            assert await reflection_code(server.channel, header) is known, chosen


async def test_a_new_kind_of_credential_opens_nothing_else(server: Harness, door: Door) -> None:
    """[mtls] on a server without TLS: nobody can have a certificate, so nobody may be taken to have one."""
    caller = Caller(server.channel, f"Bearer {token()}")
    assert await is_known(caller)
    door.write("[mtls]")
    await until(lambda: is_denied(caller))
    assert await reflection_code(server.channel) is DENIED
    assert await is_denied(Caller(server.channel))


def test_who_may_call_must_be_said_and_nobody_is_asked_on_loopback_alone(tmp_path: Path) -> None:
    given = {"base": "encoder", "adapters": tmp_path}
    with pytest.raises(SettingsError) as missing:
        resolve_settings(given, {})
    for word in ("--auth", "MULTILORA_AUTH", "auth file", "none", "loopback"):
        assert word in str(missing.value)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.com"):
        with pytest.raises(SettingsError, match=f"--auth none .*--host {host}"):
            resolve_settings({**given, "auth": "none", "host": host}, {})
    for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        assert resolve_settings({**given, "auth": "none", "host": host}, {}).host == host
