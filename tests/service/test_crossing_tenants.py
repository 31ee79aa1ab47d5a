"""What one tenant can learn of another's adapters, and do to them: nothing, by any method and any way to name one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.pb.multilora.v1 import adapters_pb2 as pb
from server.tenancy.model import Role
from tests.service.fake_runtime import DIGEST, write_adapter
from tests.service.harness import Failure, Harness, classify_request, embed_request, failure_of
from tests.service.tenants import CHANGES, INFERENCE, Caller, code_of, guarded, make_door, request_for

BY_NAME = (*INFERENCE, *CHANGES, "GetAdapter")
SPELLINGS = (
    "{0}/{1}", "{0}/{1}@1", "{0}/{1}@2", "{0}/{1}@9", "{0}/{1}@prod", "{0}/{1}@absent", "tenants/{0}/adapters/{1}",
    "tenants/{0}/adapters/{1}/versions/1", "tenants/{0}/adapters/{1}/aliases/prod",
)  # fmt: skip
BOTH = (Role.INFER, Role.ADAPTERS)
LABELS = {"labels": ["a", "b"]}
SHARE = '[[share]]\nadapter = "acme/lent"\nwith = ["bolt"]'


class World:
    """`acme` has `news` 1 and 2 with an alias, and `lent`, which `bolt` may ask; `bolt` has `own`."""

    def __init__(self, server: Harness, callers: dict[str, Caller], root: Path) -> None:
        self.server = server
        self.root = root
        self.acme, self.bolt, self.operator = callers["acme"], callers["bolt"], callers["operator"]

    async def acme_sees(self) -> list[Any]:
        """All that there is of acme's, but for its usage."""
        page = await self.acme("ListAdapters", pb.ListAdaptersRequest())
        return [
            page,
            *[await self.acme("GetAdapter", pb.GetAdapterRequest(adapter=name)) for name in ("news", "lent")],
        ]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncGenerator[World]:
    root = tmp_path / "adapters"
    for folder in ("acme/news/1", "acme/news/2", "acme/lent/1", "bolt/own/1", "bolt/news/7"):
        write_adapter(root / folder, **LABELS)
    door = make_door(tmp_path / "door", SHARE)
    keys = [("acme", "acme", BOTH), ("bolt", "bolt", BOTH), ("operator", "ops", (Role.OPERATOR,))]
    async with guarded(root, door, keys, state=tmp_path / "state") as (server, callers):
        await callers["acme"]("SetAlias", request_for("SetAlias"))
        yield World(server, callers, root)


def facts(failure: Failure, written: str, shown_as: str) -> tuple[Any, ...]:
    """All that a client learns of a failure, with one name put for the other."""
    metadata = {key: value.replace(written, shown_as) for key, value in failure.info.metadata.items()}
    message = failure.message.replace(written, shown_as)
    return failure.code, failure.info.reason, message, metadata, failure.field, failure.retry_after_s, failure.quota


@pytest.mark.parametrize("method", BY_NAME)
async def test_another_tenants_adapter_is_like_none(world: World, method: str) -> None:
    """Whether tenant and adapter are there, or either of them is not, the answer is the same."""
    before = await world.acme_sees()
    for spelling in SPELLINGS:
        theirs, no_tenant, no_adapter = [
            await failure_of(world.bolt(method, request_for(method, spelling.format(tenant, name))))
            for tenant, name in (("acme", "news"), ("ghost", "news"), ("acme", "gone"))
        ]
        assert theirs.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
        known = facts(theirs, "", "")
        assert facts(no_tenant, "ghost", "acme") == known, spelling
        assert facts(no_adapter, "gone", "news") == known, spelling
        if theirs.code is grpc.StatusCode.INVALID_ARGUMENT:  # some name an adapter alone, one names a version
            assert method in CHANGES
    plain = await failure_of(world.bolt(method, request_for(method, "tenants/acme/adapters/news/versions/1")))
    assert DIGEST not in repr(plain)
    assert await world.acme_sees() == before
    assert world.server.engine.submitted == world.server.engine.prefetched == []


@pytest.mark.parametrize("method", BY_NAME)
async def test_details_of_a_request_do_not_tell_either(world: World, method: str) -> None:
    """A request that is wrong in other fields too is answered alike for what is there and what is not."""
    oddities: tuple[dict[str, Any], ...] = (
        {"priority": 9}, {"routing_key": "k"}, {"top_k": 0}, {"version": 1}, {"version": 0}, {"version": 2},
        {"rollback": True, "version": 0}, {"alias": "default"}, {"alias": "1"}, {"request_id": "r"}, {"wait": True},
        {"request_id": "r" * 200}, {"pinned": True}, {"canary_version": 2, "canary_percent": 5.0},
        {"source": "acme/news/1"},
    )  # fmt: skip
    for fields in oddities:
        for spelling in ("{0}/{1}", "{0}/{1}@1"):
            try:
                theirs, none = (
                    request_for(method, spelling.format(tenant, "news"), **fields) for tenant in ("acme", "ghost")
                )
            except ValueError:  # a field of other methods
                continue
            found, wanted = await failure_of(world.bolt(method, theirs)), await failure_of(world.bolt(method, none))
            assert facts(wanted, "ghost", "acme") == facts(found, "", ""), fields


async def test_a_bare_name_is_the_callers_own(world: World) -> None:
    ours = await world.bolt("Classify", classify_request("news", "x"))
    assert ours.adapter == "tenants/bolt/adapters/news/versions/7"
    theirs = await world.acme("Classify", classify_request("news", "x"))
    assert theirs.adapter == "tenants/acme/adapters/news/versions/1"
    assert (await failure_of(world.bolt("Classify", classify_request("news@prod", "x")))).info.reason == (
        "ALIAS_NOT_FOUND"
    )
    assert (await failure_of(world.bolt("GetAdapter", pb.GetAdapterRequest(adapter="news@1")))).code is (
        grpc.StatusCode.NOT_FOUND
    )


async def test_the_base_is_everybodys(world: World) -> None:
    for caller in (world.acme, world.bolt, world.operator):
        for name in ("base", "base@1", "ghost/base", "acme/base"):
            reply = await caller("Embed", embed_request(name, "x"))
            assert reply.adapter == "tenants/default/adapters/base/versions/1"
        shown = (await caller("GetAdapter", pb.GetAdapterRequest(adapter="base"))).adapter
        assert shown.name == "tenants/default/adapters/base/versions/1"
    for method in ("UnloadAdapter", "DeleteAdapter", "PinAdapter", "SetAlias", "DeleteAlias", "RegisterAdapter"):
        for name in ("base@1", "acme/base@1") if method == "DeleteAdapter" else ("base", "acme/base"):
            code = await code_of(world.bolt(method, request_for(method, name)))
            assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (method, name)


async def test_lists_show_the_callers_own_alone(world: World) -> None:
    async def names(caller: Caller, **filters: Any) -> list[str]:
        found = (await caller("ListAdapters", pb.ListAdaptersRequest(**filters))).adapters
        return [adapter.name.removeprefix("tenants/").replace("/adapters/", "/") for adapter in found]

    ours = ["bolt/news/versions/7", "bolt/own/versions/1"]
    assert await names(world.bolt) == await names(world.bolt, tenant="bolt") == ours
    assert await names(world.bolt, name_prefix="lent") == []  # may be asked, but is not bolt's
    assert await names(world.bolt, name_prefix="news") == ours[:1]
    assert len(await names(world.operator, tenant="-")) == 5
    assert await names(world.operator) == []
    assert len(await names(world.operator, tenant="acme")) == 3


@pytest.mark.parametrize("method", ["ListAdapters", "WatchAdapters", "GetUsage"])
async def test_another_tenants_list_is_denied_whether_it_is_there_or_not(world: World, method: str) -> None:
    await world.acme("Classify", classify_request("news", "x"))
    denied = [
        facts(await failure_of(world.bolt(method, request_for(method, tenant=tenant))), "", "")
        for tenant in ("acme", "ghost", "-", "default")
    ]
    assert denied[0][:2] == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert denied == [denied[0]] * 4
    assert "acme" not in str(denied)
    assert await code_of(world.operator(method, request_for(method, tenant="acme"))) is grpc.StatusCode.OK


async def test_usage_is_the_callers_own(world: World) -> None:
    await world.acme("Classify", classify_request("news", "x"))
    await world.acme("Classify", classify_request("lent", "x"))
    await world.bolt("Classify", classify_request("acme/lent", "x"))

    async def used(caller: Caller, **fields: Any) -> list[tuple[str, str, int]]:
        entries = (await caller("GetUsage", request_for("GetUsage", **fields))).entries
        return [(entry.tenant, entry.adapter.split("/")[3], entry.requests) for entry in entries]

    async with asyncio.timeout(5):  # the engine counts after it has answered
        while len(await used(world.operator, tenant="-")) < 3:
            await asyncio.sleep(0.01)
    ours, theirs = [("bolt", "lent", 1)], [("acme", "lent", 1), ("acme", "news", 1)]
    assert await used(world.bolt) == await used(world.bolt, tenant="bolt") == ours
    assert await used(world.acme) == theirs
    assert await used(world.operator, tenant="-") == [*theirs, *ours]


async def test_a_page_token_opens_no_other_list(world: World) -> None:
    first = await world.acme("ListAdapters", pb.ListAdaptersRequest(page_size=1))
    everything = await world.operator("ListAdapters", pb.ListAdaptersRequest(page_size=1, tenant="-"))
    made_up = base64.urlsafe_b64encode(b"ghost/news@1").decode()
    failures = [
        facts(await failure_of(world.bolt("ListAdapters", pb.ListAdaptersRequest(page_token=token))), "", "")
        for token in (first.next_page_token, everything.next_page_token, made_up)
    ]
    assert failures[0][4] == "page_token"
    assert failures == [failures[0]] * 3


async def read_changes(caller: Caller, number: int, **fields: Any) -> list[pb.WatchAdaptersResponse]:
    call = caller.start("WatchAdapters", pb.WatchAdaptersRequest(**fields))
    async with asyncio.timeout(5):
        found = [await call.read() for _ in range(number)]
    call.cancel()
    return found


async def test_a_watcher_sees_its_own_alone_whatever_token_it_resumes_from(world: World) -> None:
    snapshot = await read_changes(world.bolt, 5)
    assert snapshot[-1].snapshot_complete
    assert "acme" not in str(snapshot)
    theirs = (await read_changes(world.acme, 7))[-1]
    everybodys = (await read_changes(world.operator, 11, tenant="-"))[-1]
    assert theirs.snapshot_complete and everybodys.snapshot_complete
    await world.acme("LoadAdapter", pb.LoadAdapterRequest(adapter="news", wait=True))
    await world.acme("DeleteAlias", request_for("DeleteAlias"))
    await world.acme("DeleteAdapter", pb.DeleteAdapterRequest(adapter="news@2"))
    await world.bolt("LoadAdapter", pb.LoadAdapterRequest(adapter="own", wait=True))
    for token in (snapshot[-1].resume_token, theirs.resume_token, everybodys.resume_token):
        (seen,) = await read_changes(world.bolt, 1, resume_token=token)
        assert seen.adapter.name == "tenants/bolt/adapters/own/versions/1"


async def test_a_resume_token_does_not_count_others_changes(world: World) -> None:
    """Neither its length nor what it decodes to says how much happened elsewhere."""
    before = (await read_changes(world.bolt, 5))[-1].resume_token
    for _ in range(120):
        await world.acme("LoadAdapter", pb.LoadAdapterRequest(adapter="news", wait=True))
        await world.acme("UnloadAdapter", pb.UnloadAdapterRequest(adapter="news"))
    after = (await read_changes(world.bolt, 5))[-1].resume_token
    assert len(before) == len(after)
    decoded = [base64.urlsafe_b64decode(token) for token in (before, after)]
    assert sum(a == b for a, b in zip(*decoded, strict=True)) < len(decoded[0]) / 2
    assert not any(str(number).encode() in decoded[1] for number in range(200, 300))


async def test_a_request_id_is_each_tenants_own(world: World) -> None:
    """The very bytes of another tenant's call get no answer of its."""
    write_adapter(world.root / "acme" / "drafts" / "new", **LABELS)
    fresh = request_for("RegisterAdapter", "fresh", source="acme/drafts/new", request_id="4")
    calls: list[tuple[str, Any]] = [
        ("PinAdapter", pb.PinAdapterRequest(adapter="news", pinned=True, request_id="1")),
        ("SetAlias", pb.SetAliasRequest(adapter="news", alias="prod", version=2, request_id="2")),
        ("DeleteAlias", pb.DeleteAliasRequest(adapter="news", alias="prod", request_id="3")),
        ("RegisterAdapter", fresh),
        ("DeleteAdapter", pb.DeleteAdapterRequest(adapter="fresh@1", request_id="5")),
    ]
    replies = [await world.acme(method, request) for method, request in calls]
    ours = await world.bolt(*calls[0])
    assert ours.adapter.name == "tenants/bolt/adapters/news/versions/7"
    for method, request in calls[1:]:  # bolt has no such version, alias or folder
        wanted = grpc.StatusCode.INVALID_ARGUMENT if request is fresh else grpc.StatusCode.NOT_FOUND
        assert await code_of(world.bolt(method, request)) is wanted
    assert [await world.acme(method, request) for method, request in calls] == replies
    for tenant in ("acme", "ghost"):
        request = pb.PinAdapterRequest(adapter=f"{tenant}/news", pinned=True, request_id="1")
        failure = await failure_of(world.bolt("PinAdapter", request))
        assert failure.code is grpc.StatusCode.NOT_FOUND


async def test_a_tenant_cannot_take_all_upload_slots(world: World, tmp_path: Path) -> None:
    header, data = pb.UploadAdapterRequest(), b'{"labels": ["a", "b"]}'
    header.header.name = "sent"
    header.header.files.add(path="adapter_config.json", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    first = [header, pb.UploadAdapterRequest(data=data[:5])]

    async def held(messages: list[pb.UploadAdapterRequest]) -> AsyncIterator[pb.UploadAdapterRequest]:
        for message in messages:
            yield message
        await asyncio.Event().wait()

    calls = [world.acme.start("UploadAdapter", held(first)) for _ in range(2)]
    async with asyncio.timeout(5):
        while len([*(tmp_path / "state" / "incoming").glob("*/*")]) < 2:
            await asyncio.sleep(0.01)
    whole = [header, pb.UploadAdapterRequest(data=data)]
    failure = await failure_of(world.acme("UploadAdapter", whole))
    assert (failure.code, failure.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 2.0)
    assert "tenant acme sends 2 uploads at once, the limit of a tenant" in failure.message
    assert (await world.bolt("UploadAdapter", whole)).adapter.version == 1
    for call in calls:
        call.cancel()
    async with asyncio.timeout(5):
        while [*(tmp_path / "state" / "incoming").glob("*")]:
            await asyncio.sleep(0.01)
    assert (await world.acme("UploadAdapter", whole)).adapter.version == 1


async def test_a_folder_of_another_tenant_cannot_be_registered(world: World) -> None:
    """Else its weights could be asked under a name of one's own. Whether it is there is not told either."""
    (world.root / "bolt" / "link").symlink_to(world.root / "acme" / "news")
    write_adapter(world.root / "bolt" / "drafts" / "new", **LABELS)
    write_adapter(world.root / "plain", **LABELS)
    for there, absent in (
        ("acme/news/1", "acme/news/8"),
        ("acme/news", "ghost/news"),
        ("acme", "ghost"),
        ("plain", "absent"),
        ("bolt/link/1", "bolt/link/8"),
        ("bolt", "ghost"),
        ("./acme/news/1", "./ghost/news/1"),
        ("BOLT/own/1", "ghost"),
    ):
        theirs, none = [
            await failure_of(world.bolt("RegisterAdapter", request_for("RegisterAdapter", "mine", source=source)))
            for source in (there, absent)
        ]
        assert (theirs.code, theirs.field) == (grpc.StatusCode.INVALID_ARGUMENT, "source"), there
        assert facts(theirs, repr(there), "") == facts(none, repr(absent), "")
    ours = await world.bolt("RegisterAdapter", request_for("RegisterAdapter", "mine", source="bolt/drafts/new"))
    assert ours.adapter.source == "bolt/drafts/new"
    lent = await world.operator("RegisterAdapter", request_for("RegisterAdapter", "bolt/mine", source="acme/news/1"))
    assert lent.adapter.version == 2


async def test_a_shared_adapter_can_be_asked_and_looked_at_and_no_more(world: World) -> None:
    for spelling in ("acme/lent", "acme/lent@1", "tenants/acme/adapters/lent", "acme/lent@default"):
        reply = await world.bolt("Classify", classify_request(spelling, "x"))
        assert reply.adapter == "tenants/acme/adapters/lent/versions/1"
    shown = await world.bolt("GetAdapter", pb.GetAdapterRequest(adapter="acme/lent"))
    assert shown.adapter.name == "tenants/acme/adapters/lent/versions/1"
    before = await world.acme_sees()
    for method in CHANGES:
        for spelling in ("acme/{}", "acme/{}@1"):
            theirs, none = [
                await failure_of(world.bolt(method, request_for(method, spelling.format(name))))
                for name in ("lent", "gone")
            ]
            assert theirs.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
            assert facts(theirs, "lent", "gone") == facts(none, "", "")
    assert await world.acme_sees() == before
    listed = await world.bolt("ListAdapters", pb.ListAdaptersRequest())
    assert "lent" not in str(listed)


async def test_an_operator_may_do_everything_for_every_tenant(world: World) -> None:
    as_operator = world.operator
    assert (await as_operator("Classify", classify_request("acme/news", "x"))).version == 1
    await as_operator("RegisterAdapter", request_for("RegisterAdapter", "acme/third", source="bolt/own/1"))
    await as_operator("LoadAdapter", pb.LoadAdapterRequest(adapter="acme/third", wait=True))
    await as_operator("PinAdapter", pb.PinAdapterRequest(adapter="acme/third", pinned=True))
    await as_operator("PinAdapter", pb.PinAdapterRequest(adapter="acme/third"))
    await as_operator("SetAlias", request_for("SetAlias", "acme/news", version=2))
    await as_operator("SetAlias", request_for("SetAlias", "acme/news", version=0, rollback=True))
    await as_operator("DeleteAlias", request_for("DeleteAlias", "acme/news"))
    await as_operator("UnloadAdapter", pb.UnloadAdapterRequest(adapter="acme/third"))
    await as_operator("DeleteAdapter", pb.DeleteAdapterRequest(adapter="acme/third@1"))
    assert (await as_operator("GetAdapter", pb.GetAdapterRequest(adapter="acme/news"))).adapter.version == 1
