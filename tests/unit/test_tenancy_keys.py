"""API keys: only the right, live one is accepted, and the file keeps no secret and loses no change."""

from __future__ import annotations

import hmac
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from server.tenancy import keys as keys_module
from server.tenancy.auth_file import KeyFileError
from server.tenancy.keys import KeyRing, KeyStore, WatchedKeys, read_keys
from server.tenancy.model import Principal, Role

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
NOW_S = NOW.timestamp()
INFER = frozenset({Role.INFER})


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "keys.json")


def ring(store: KeyStore) -> KeyRing:
    return KeyRing(store.list())


def test_a_created_key_is_its_tenants(store: KeyStore) -> None:
    token, key = store.create("acme", [Role.INFER, Role.ADAPTERS], NOW, note="ci")
    assert token.startswith(f"ml_{key.id}_")
    assert ring(store).verify(token, NOW_S) == Principal("acme", frozenset({Role.INFER, Role.ADAPTERS}), key.id)
    assert store.list() == (key,)


def test_keys_differ(store: KeyStore) -> None:
    tokens = {store.create("acme", INFER, NOW)[0] for _ in range(20)}
    assert len({token.split("_", 2)[1] for token in tokens}) == 20
    assert len({token.split("_", 2)[2] for token in tokens}) == 20


def test_the_file_keeps_no_secret_and_is_for_its_owner_alone(store: KeyStore, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        token, _ = store.create("acme", INFER, NOW)
        store.create("acme", INFER, NOW)
    finally:
        os.umask(previous)
    path = tmp_path / "keys.json"
    assert token.split("_", 2)[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys.json.lock").stat().st_mode) == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]  # nothing half written


def test_an_expired_key_is_refused(store: KeyStore) -> None:
    token, key = store.create("acme", INFER, NOW, NOW + timedelta(days=1))
    day_s = 86_400
    assert ring(store).verify(token, NOW_S + day_s - 1) is not None
    assert ring(store).verify(token, NOW_S + day_s) is None
    assert key.state(NOW) == "active"
    assert key.state(NOW + timedelta(days=1)) == "expired"


def test_a_revoked_key_is_refused_and_keeps_its_time(store: KeyStore) -> None:
    token, key = store.create("acme", INFER, NOW)
    other, _ = store.create("acme", INFER, NOW)
    store.revoke(key.id, NOW + timedelta(hours=1))
    again = store.revoke(key.id, NOW + timedelta(hours=2))
    assert again.revoked == NOW + timedelta(hours=1)
    assert ring(store).verify(token, NOW_S) is None
    assert ring(store).verify(other, NOW_S) is not None


def test_an_unknown_key_cannot_be_revoked(store: KeyStore) -> None:
    store.create("acme", INFER, NOW)
    with pytest.raises(KeyFileError, match="has no key 'aaaaaaaaaaaa'"):
        store.revoke("aaaaaaaaaaaa", NOW)


def swapped_last(text: str) -> str:
    return text[:-1] + ("B" if text[-1] == "A" else "A")


def test_a_secret_is_of_one_key_only(store: KeyStore) -> None:
    first, _ = store.create("acme", INFER, NOW)
    second, _ = store.create("beta", INFER, NOW)
    crossed = "_".join([*first.split("_", 2)[:2], second.split("_", 2)[2]])
    assert ring(store).verify(crossed, NOW_S) is None


@pytest.mark.parametrize(
    "change",
    [
        swapped_last,
        lambda token: token + "A",
        lambda token: token[:-1],
        lambda token: token + "=",
        lambda token: token + "\n",
        lambda token: " " + token,
        lambda token: token.upper(),
        lambda token: "ml_" + "a" * 12 + token[15:],
        lambda token: token.replace("ml_", "ml-", 1),
        lambda token: token[:16],
        lambda token: token[:-1] + "é",
        lambda _: "",
        lambda _: "ml_",
        lambda _: "ml__",
        lambda _: "ml_" + "a" * 8000,
    ],
)
def test_a_wrong_or_malformed_key_is_refused(store: KeyStore, change: Any) -> None:
    token, _ = store.create("acme", INFER, NOW)
    assert ring(store).verify(change(token), NOW_S) is None


def test_unknown_ids_are_compared_like_known_ones(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = store.create("acme", INFER, NOW)
    known = ring(store)
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((len(ours), len(theirs)))
        return real(ours, theirs)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    for presented in (token, swapped_last(token), "ml_" + "a" * 12 + token[15:]):
        known.verify(presented, NOW_S)
    assert compared == [(32, 32)] * 3


def test_no_change_is_lost_when_many_are_made_at_once(store: KeyStore, tmp_path: Path) -> None:
    old = [store.create("acme", INFER, NOW)[1].id for _ in range(12)]

    def change(number: int) -> None:
        own = KeyStore(tmp_path / "keys.json")
        if number % 2:
            own.revoke(old[number // 2], NOW)
        else:
            own.create("beta", INFER, NOW)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(change, range(24)))
    keys = store.list()
    assert len(keys) == 24
    assert {key.id for key in keys if key.revoked} == set(old)


def test_processes_wait_for_each_other(store: KeyStore, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from server.tenancy.keys import KeyStore, utc_now\n"
        "from server.tenancy.model import Role\n"
        "for _ in range(10): KeyStore(Path(sys.argv[1])).create('acme', [Role.INFER], utc_now())"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "keys.json")]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert len(store.list()) == 20


def test_a_symlink_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to(tmp_path / "secrets" / "keys.json")
    KeyStore(link).create("acme", INFER, NOW)
    assert link.is_symlink()
    assert len(read_keys(link)) == 1


@pytest.mark.parametrize(
    ("tenant", "roles", "note"), [("../acme", INFER, ""), ("", INFER, ""), ("acme", (), ""), ("acme", INFER, "x" * 201)]
)
def test_a_key_that_could_not_be_used_is_not_created(
    store: KeyStore, tmp_path: Path, tenant: str, roles: Any, note: str
) -> None:
    with pytest.raises(ValueError, match=r"tenant|roles|note"):
        store.create(tenant, roles, NOW, note=note)
    assert not (tmp_path / "keys.json").exists()


def edited(path: Path, **changes: Any) -> str:
    data = json.loads(path.read_text())
    data["keys"][0].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    "broken",
    [
        lambda _: "",
        lambda _: "[]",
        lambda path: path.read_text()[:-20],
        lambda path: edited(path, colour="red"),
        lambda path: edited(path, roles=["root"]),
        lambda path: edited(path, salt="00"),
        lambda path: edited(path, tenant="../acme"),
        lambda path: edited(path, expires="2026-01-01T00:00:00"),  # of which zone?
        lambda path: json.dumps({"format": 1, "keys": json.loads(path.read_text())["keys"] * 2}),
        lambda path: json.dumps({**json.loads(path.read_text()), "format": 2}),
    ],
)
def test_a_broken_file_is_refused_by_name_and_never_overwritten(store: KeyStore, tmp_path: Path, broken: Any) -> None:
    token, _ = store.create("acme", INFER, NOW)
    path = tmp_path / "keys.json"
    errors: list[Exception] = []
    watched = WatchedKeys(path, errors.append)
    text = broken(path)
    path.write_text(text)
    with pytest.raises(KeyFileError, match=r"keys\.json: ") as caught:
        read_keys(path)
    assert token not in str(caught.value)
    with pytest.raises(KeyFileError):
        store.create("beta", INFER, NOW)
    assert path.read_text() == text
    assert not watched.poll()
    assert not watched.poll()
    assert len(errors) == 1
    assert watched.verify(token, NOW_S) is not None  # the old keys serve on


def test_the_server_follows_the_file(store: KeyStore, tmp_path: Path) -> None:
    first, key = store.create("acme", INFER, NOW)
    watched = WatchedKeys(tmp_path / "keys.json", lambda error: pytest.fail(str(error)))
    second, _ = store.create("beta", INFER, NOW)
    assert watched.verify(second, NOW_S) is None
    assert watched.poll()
    assert watched.verify(second, NOW_S) is not None
    store.revoke(key.id, NOW)
    assert watched.poll()
    assert watched.verify(first, NOW_S) is None
    assert not watched.poll()


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="multilora keys create"):
        WatchedKeys(tmp_path / "keys.json", lambda _: None)


def test_a_folder_that_is_not_there_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be written"):
        KeyStore(tmp_path / "absent" / "keys.json").create("acme", INFER, NOW)
