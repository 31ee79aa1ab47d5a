"""Aliases as a client sees them: they move whole, after a load, and share requests by key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.pb.multilora.v1 import adapters_pb2 as pb
from tests.service.fake_runtime import write_adapter
from tests.service.harness import Harness, classify_request, failure_of, running


@pytest.fixture
def news_root(tmp_path: Path) -> Path:
    """Versions 1 to 3 of `news`, of which 3 cannot be loaded, and 1 and 2 of `acme/news`."""
    root = tmp_path / "adapters"
    for version in (1, 2):
        write_adapter(root / "news" / str(version), labels=["a", "b"])
        write_adapter(root / "acme" / "news" / str(version), labels=["a", "b"])
    write_adapter(root / "news" / "3", labels=["a", "b"], weights="broken")
    return root


@pytest.fixture
async def news(news_root: Path) -> AsyncGenerator[Harness]:
    async with running(news_root) as server:
        yield server


async def move(server: Harness, alias: str, version: int, adapter: str = "news", **fields: Any) -> pb.Alias:
    request = pb.SetAliasRequest(adapter=adapter, alias=alias, version=version, **fields)
    return (await server.adapters.SetAlias(request)).alias


async def roll_back(server: Harness, alias: str) -> pb.Alias:
    request = pb.SetAliasRequest(adapter="news", alias=alias, rollback=True)
    return (await server.adapters.SetAlias(request)).alias


async def aliases(server: Harness, adapter: str = "news@1") -> dict[str, pb.Alias]:
    reply = await server.adapters.GetAdapter(pb.GetAdapterRequest(adapter=adapter))
    return {alias.name.rpartition("/")[2]: alias for alias in reply.aliases}


async def state(server: Harness, adapter: str) -> int:
    return (await server.adapters.GetAdapter(pb.GetAdapterRequest(adapter=adapter))).adapter.state


async def answers(server: Harness, adapter: str, key: str = "") -> int:
    """The version that answers."""
    return (await server.inference.Classify(classify_request(adapter, "text", routing_key=key))).version


async def answers_by_key(server: Harness, adapter: str, num_keys: int) -> list[int]:
    return await asyncio.gather(*(answers(server, adapter, f"user-{key}") for key in range(num_keys)))


async def test_an_alias_leads_to_its_version_once_the_call_is_answered(news: Harness) -> None:
    alias = await move(news, "prod", 2)
    assert alias == pb.Alias(name="tenants/default/adapters/news/aliases/prod", version=2)
    for reference in ("news@prod", "default/news@prod", alias.name):
        assert await answers(news, reference) == 2
    assert await answers(news, "news") == 1
    adapter = (await news.adapters.GetAdapter(pb.GetAdapterRequest(adapter="news@prod"))).adapter
    assert (adapter.version, list(adapter.aliases)) == (2, ["prod"])


async def test_the_version_is_loaded_before_the_alias_moves(news: Harness) -> None:
    await move(news, "prod", 2)
    assert await state(news, "news@2") == pb.ADAPTER_STATE_READY
    await move(news, "prod", 2, canary_version=1, canary_percent=5)
    assert await state(news, "news@1") == pb.ADAPTER_STATE_READY


@pytest.mark.parametrize("fields", [{"version": 3}, {"version": 1, "canary_version": 3, "canary_percent": 1.0}])
async def test_a_version_that_cannot_be_loaded_leaves_the_alias(news: Harness, fields: dict[str, Any]) -> None:
    before = await move(news, "prod", 2)
    failure = await failure_of(news.adapters.SetAlias(pb.SetAliasRequest(adapter="news", alias="prod", **fields)))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "NaN" in failure.message
    assert (await aliases(news))["prod"] == before
    assert await answers(news, "news@prod") == 2


async def test_a_new_alias_whose_version_cannot_be_loaded_is_not_there(news: Harness) -> None:
    await failure_of(move(news, "prod", 3))
    failure = await failure_of(answers(news, "news@prod"))
    assert (failure.code, list(await aliases(news))) == (grpc.StatusCode.NOT_FOUND, ["default"])


async def test_a_rollback_leads_back_and_a_second_one_leads_forth(news: Harness) -> None:
    await move(news, "prod", 1)
    assert (await move(news, "prod", 2)).previous_version == 1
    back = await roll_back(news, "prod")
    assert (back.version, back.previous_version) == (1, 2)
    assert await answers(news, "news@prod") == 1
    forth = await roll_back(news, "prod")
    assert (forth.version, forth.previous_version) == (2, 1)
    assert await answers(news, "news@prod") == 2


async def test_rollbacks_at_once_come_one_after_the_other(news: Harness) -> None:
    await move(news, "prod", 1)
    await move(news, "prod", 2)
    replies = await asyncio.gather(*(roll_back(news, "prod") for _ in range(6)))
    assert sorted(alias.version for alias in replies) == [1, 1, 1, 2, 2, 2]
    assert (await aliases(news))["prod"].version == 2


async def test_a_move_to_where_it_is_keeps_the_way_back(news: Harness) -> None:
    await move(news, "prod", 1)
    await move(news, "prod", 2)
    assert (await move(news, "prod", 2)).previous_version == 1
    assert (await move(news, "prod", 2, canary_version=1, canary_percent=10)).previous_version == 1
    for version in (2, 1):  # first the canary goes, then the version
        back = await roll_back(news, "prod")
        assert (back.version, back.canary_version, back.canary_percent) == (version, 0, 0)


async def test_an_alias_that_never_moved_has_nothing_to_roll_back_to(news: Harness) -> None:
    await move(news, "prod", 1)
    failure = await failure_of(roll_back(news, "prod"))
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    assert (await failure_of(roll_back(news, "absent"))).code is grpc.StatusCode.NOT_FOUND


async def test_a_rollback_to_a_deleted_version_leaves_the_alias(news: Harness) -> None:
    await move(news, "default", 2)
    await news.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="news@1"))
    assert (await failure_of(roll_back(news, "default"))).code is grpc.StatusCode.NOT_FOUND
    assert await answers(news, "news") == 2


async def test_a_canary_gets_its_share_and_keeps_its_keys(news: Harness) -> None:
    await move(news, "prod", 1, canary_version=2, canary_percent=5)
    at_5 = await answers_by_key(news, "news@prod", 400)
    assert at_5 == await answers_by_key(news, "news@prod", 400), "a key has one version"
    await move(news, "prod", 1, canary_version=2, canary_percent=10)
    at_10 = await answers_by_key(news, "news@prod", 400)
    await move(news, "prod", 1, canary_version=2, canary_percent=60)
    at_60 = await answers_by_key(news, "news@prod", 400)
    for fewer, more in ((at_5, at_10), (at_10, at_60)):
        assert all(late == 2 for early, late in zip(fewer, more, strict=True) if early == 2)
    shares = [versions.count(2) / 400 for versions in (at_5, at_10, at_60)]
    assert 0.02 < shares[0] < 0.09 and 0.06 < shares[1] < 0.15 and 0.53 < shares[2] < 0.67
    await move(news, "prod", 2)
    assert set(await answers_by_key(news, "news@prod", 20)) == {2}


async def test_requests_without_a_key_are_drawn(news: Harness) -> None:
    await move(news, "prod", 1, canary_version=2, canary_percent=50)
    drawn = await asyncio.gather(*(answers(news, "news@prod") for _ in range(100)))
    assert 25 < drawn.count(2) < 75


async def test_both_versions_of_a_weighted_alias_have_it(news: Harness) -> None:
    alias = await move(news, "prod", 1, canary_version=2, canary_percent=2.5)
    assert (alias.version, alias.canary_version, alias.canary_percent) == (1, 2, 2.5)
    page = await news.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert [list(adapter.aliases) for adapter in page.adapters] == [["default", "prod"], ["prod"], []]


async def test_the_default_starts_at_the_first_version_and_moves_only_when_told(news: Harness, news_root: Path) -> None:
    write_adapter(news_root / "more", labels=["a", "b"])
    for _ in range(2):
        await news.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="fresh", version=7, source="more"))
        reply = await news.adapters.RegisterAdapter(pb.RegisterAdapterRequest(name="fresh", source="more"))
        assert reply.adapter.version == 8
        assert await answers(news, "fresh") == 7
        assert (await move(news, "default", 8, adapter="fresh")).previous_version == 7
        assert await answers(news, "fresh") == await answers(news, "fresh@default") == 8
        for version in (7, 8):
            await news.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter=f"fresh@{version}"))


async def test_a_deleted_alias_leads_nowhere_and_the_version_stays(news: Harness) -> None:
    await move(news, "prod", 2)
    await news.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="news", alias="prod"))
    failure = await failure_of(answers(news, "news@prod"))
    assert failure.code is grpc.StatusCode.NOT_FOUND
    assert await answers(news, "news@2") == 2
    failure = await failure_of(news.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="news", alias="prod")))
    assert failure.code is grpc.StatusCode.NOT_FOUND


async def test_tenants_have_aliases_of_their_own(news: Harness) -> None:
    alias = await move(news, "prod", 2, adapter="acme/news")
    assert alias.name == "tenants/acme/adapters/news/aliases/prod"
    assert await answers(news, "acme/news@prod") == 2
    assert (await failure_of(answers(news, "news@prod"))).code is grpc.StatusCode.NOT_FOUND
    assert list(await aliases(news, "acme/news")) == ["default", "prod"]


WRONG_ALIASES: list[tuple[dict[str, Any], str]] = [
    ({"adapter": "", "alias": "prod", "version": 1}, "adapter"),
    ({"adapter": "news@1", "alias": "prod", "version": 1}, "adapter"),
    ({"adapter": "news@default", "alias": "prod", "version": 1}, "adapter"),
    ({"adapter": "tenants/default/adapters/news/aliases/default", "alias": "prod", "version": 1}, "adapter"),
    ({"adapter": "base", "alias": "prod", "version": 1}, "adapter"),
    ({"alias": "", "version": 1}, "alias"),
    ({"alias": "7", "version": 1}, "alias"),
    ({"alias": "1st", "version": 1}, "alias"),
    ({"alias": "a b", "version": 1}, "alias"),
    ({"alias": "prod"}, "version"),
    ({"alias": "prod", "version": -1}, "version"),
    ({"alias": "prod", "version": 1_000_000_000}, "version"),
    ({"alias": "prod", "version": 1, "canary_percent": 5.0}, "canary_version"),
    ({"alias": "prod", "version": 1, "canary_version": 1, "canary_percent": 5.0}, "canary_version"),
    ({"alias": "prod", "version": 1, "canary_version": -2, "canary_percent": 5.0}, "canary_version"),
    ({"alias": "prod", "version": 1, "canary_version": 2}, "canary_percent"),
    ({"alias": "prod", "version": 1, "canary_version": 2, "canary_percent": 100.0}, "canary_percent"),
    ({"alias": "prod", "version": 1, "canary_version": 2, "canary_percent": -5.0}, "canary_percent"),
    ({"alias": "prod", "version": 1, "canary_version": 2, "canary_percent": float("nan")}, "canary_percent"),
    ({"alias": "prod", "version": 1, "rollback": True}, "rollback"),
    ({"alias": "prod", "canary_percent": 5.0, "rollback": True}, "rollback"),
    ({"alias": "prod", "version": 1, "request_id": "x" * 129}, "request_id"),
]


async def test_a_wrong_alias_names_its_field(news: Harness) -> None:
    for fields, field in WRONG_ALIASES:
        failure = await failure_of(news.adapters.SetAlias(pb.SetAliasRequest(**{"adapter": "news"} | fields)))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, field), fields
    assert list(await aliases(news)) == ["default"]


async def test_an_alias_to_what_is_not_there_is_not_found(news: Harness) -> None:
    canary = {"version": 1, "canary_version": 9, "canary_percent": 5.0}
    for fields in ({"version": 9}, canary, {"adapter": "absent"}):
        request = pb.SetAliasRequest(**{"adapter": "news", "alias": "prod", "version": 1} | fields)
        assert (await failure_of(news.adapters.SetAlias(request))).code is grpc.StatusCode.NOT_FOUND, fields


async def test_what_cannot_be_removed_is_said(news: Harness) -> None:
    for adapter, alias, code in (
        ("news", "default", grpc.StatusCode.INVALID_ARGUMENT),
        ("news", "", grpc.StatusCode.INVALID_ARGUMENT),
        ("news", "7", grpc.StatusCode.INVALID_ARGUMENT),
        ("news@prod", "prod", grpc.StatusCode.INVALID_ARGUMENT),
        ("absent", "prod", grpc.StatusCode.NOT_FOUND),
    ):
        failure = await failure_of(news.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter=adapter, alias=alias)))
        assert failure.code is code, (adapter, alias)


async def test_aliases_outlive_a_restart(news_root: Path, tmp_path: Path) -> None:
    async with running(news_root, state=tmp_path / "state") as server:
        await move(server, "prod", 1)
        await move(server, "prod", 2, canary_version=1, canary_percent=2.5)
        await move(server, "default", 2)
        await move(server, "gone", 2)
        await server.adapters.DeleteAlias(pb.DeleteAliasRequest(adapter="news", alias="gone"))
        before = await aliases(server)
    async with running(news_root, state=tmp_path / "state") as server:
        assert await aliases(server) == before
        assert before["prod"].previous_version == 1
        assert await answers(server, "news") == 2
        assert [(await roll_back(server, "prod")).version for _ in range(2)] == [2, 1]


async def test_the_default_stays_where_it_was_though_a_lower_version_comes(tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    write_adapter(root / "news" / "2", labels=["a", "b"])
    async with running(root, state=tmp_path / "state") as server:
        assert await answers(server, "news") == 2
    write_adapter(root / "news" / "1", labels=["a", "b"])
    async with running(root, state=tmp_path / "state") as server:
        assert await answers(server, "news") == 2


async def test_a_weighted_alias_loses_only_the_version_whose_folder_went(news_root: Path, tmp_path: Path) -> None:
    async with running(news_root, state=tmp_path / "state") as server:
        await move(server, "prod", 1, canary_version=2, canary_percent=50)
    (news_root / "news" / "2" / "adapter_config.json").unlink()
    async with running(news_root, state=tmp_path / "state") as server:
        assert set(await answers_by_key(server, "news@prod", 20)) == {1}


async def test_a_request_whose_version_is_deleted_meanwhile_follows_its_alias(news: Harness) -> None:
    """To replace a version and delete the old one fails nobody who asked by the name; who named the version is told."""
    assert news.runtime is not None
    news.runtime.tokenizer_gate.clear()
    names = ("news", "news@default", "tenants/default/adapters/news")
    by_name = [asyncio.ensure_future(answers(news, name)) for name in names]
    by_version = asyncio.ensure_future(failure_of(answers(news, "news@1")))
    await news.until_admitted(4)
    await move(news, "default", 2)
    await news.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="news@1"))
    news.runtime.tokenizer_gate.set()
    assert await asyncio.gather(*by_name) == [2, 2, 2]
    assert (await by_version).code is grpc.StatusCode.NOT_FOUND
    assert await news.sample("multilora_admitted_sequences") == 0
