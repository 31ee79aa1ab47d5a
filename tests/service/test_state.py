"""What the state store returned from is there after a kill, wholly; what it cannot trust, it refuses."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import AdapterId, Alias
from server.control.database import STATE_FILE
from server.control.state import MAX_REPLIES, Changes, Registration, Reply, StateError, StateStore, StateUnavailable

NEWS = AdapterId("default", "news", 1)
SHA = "ab" * 32

COMMIT_FOR_EVER = """
import sys
from pathlib import Path
from lora_runtime.types import AdapterId, Alias
from server.control.state import Changes, Registration, Reply, StateStore

store = StateStore(Path(sys.argv[1]))
number = len(store.registrations())
while True:
    number += 1
    adapter = AdapterId("default", "news", number)
    store.commit(
        Changes(
            put_registration=Registration(adapter, f"news-{number}", None, False),
            put_aliases=(Alias("default", "news", "prod", number),),
            set_pin=(adapter, True),
            reply=Reply(str(number), "Register", str(number), b"x" * 3000),
        )
    )
    print(number, flush=True)
"""


def registered(adapter: AdapterId, url: str = "news-v1") -> Registration:
    return Registration(adapter, url, None, uploaded=False)


def replied(request_id: str, content: bytes = b"answer", method: str = "Register", sha256: str = SHA) -> Reply:
    return Reply(request_id, method, sha256, content)


@contextmanager
def committing(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that commits and prints numbers until it is killed."""
    command = [sys.executable, "-c", COMMIT_FOR_EVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond this fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "state"
    remote = Registration(AdapterId("acme", "news", 3), "hf://org/news@main", "c0ffee", uploaded=False)
    sent = Registration(AdapterId("acme", "spam", 1), "upload", None, uploaded=True)
    prod = Alias("acme", "news", "prod", 3, canary_version=2, canary_percent=12.5, previous_version=1)
    default = Alias("acme", "news", "default", 3)
    with closing(StateStore(folder)) as store:
        store.commit(Changes(put_registration=remote, put_aliases=(prod, default), set_pin=(remote.id, True)))
        store.commit(Changes(put_registration=sent))
    with closing(StateStore(folder)) as store:
        assert store.registrations() == [remote, sent]
        assert store.aliases() == [default, prod]
        assert store.pins() == {remote.id}


def test_what_was_deleted_stays_deleted(tmp_path: Path) -> None:
    other = AdapterId("default", "news", 2)
    prod = Alias("default", "news", "prod", 2)
    with closing(StateStore(tmp_path)) as store:
        store.commit(Changes(put_registration=registered(NEWS), set_pin=(NEWS, True)))
        store.commit(Changes(put_registration=registered(other), set_pin=(other, True), put_aliases=(prod,)))
        store.commit(Changes(delete_adapter=NEWS))
        assert store.registrations() == [registered(other)]
        assert store.pins() == {other}
        store.commit(Changes(set_pin=(other, False), delete_alias=Alias("default", "news", "prod", 1)))
    with closing(StateStore(tmp_path)) as store:
        assert store.registrations() == [registered(other)]
        assert not store.pins()
        assert not store.aliases()


def test_an_alias_that_moves_replaces_its_row() -> None:
    with closing(StateStore(None)) as store:
        store.commit(Changes(put_aliases=(Alias("default", "news", "prod", 1),)))
        moved = Alias("default", "news", "prod", 2, previous_version=1)
        store.commit(Changes(put_aliases=(moved,)))
        assert store.aliases() == [moved]


def test_without_a_folder_nothing_survives() -> None:
    with closing(StateStore(None)) as store:
        store.commit(Changes(put_registration=registered(NEWS)))
        assert store.registrations() == [registered(NEWS)]
        with closing(StateStore(None)) as other:
            assert not other.registrations()


def test_a_repeated_call_gets_its_first_answer_also_after_a_restart(tmp_path: Path) -> None:
    with closing(StateStore(tmp_path)) as store:
        assert store.replay("id-1", "Register", SHA) is None
        store.commit(Changes(put_registration=registered(NEWS), reply=replied("id-1")))
        assert store.replay("id-1", "Register", SHA) == b"answer"
        store.commit(Changes(reply=replied("id-2", b"")))
    with closing(StateStore(tmp_path)) as store:
        assert store.replay("id-1", "Register", SHA) == b"answer"
        assert store.replay("id-2", "Register", SHA) == b"", "an empty answer is an answer"


@pytest.mark.parametrize(("method", "sha256"), [("Delete", SHA), ("Register", "cd" * 32)])
def test_a_request_id_stands_for_one_call(method: str, sha256: str) -> None:
    with closing(StateStore(None)) as store:
        store.commit(Changes(reply=replied("id-1")))
        with pytest.raises(InvalidRequest, match="request_id"):
            store.replay("id-1", method, sha256)
        for late in (replied("id-1", method=method, sha256=sha256), replied("id-1")):
            with pytest.raises(InvalidRequest, match="request_id"):
                store.commit(Changes(put_registration=registered(NEWS), set_pin=(NEWS, True), reply=late))
        assert not store.registrations(), "nothing of a refused call is applied"
        assert not store.pins()


@pytest.mark.slow
def test_the_oldest_replies_are_dropped() -> None:
    with closing(StateStore(None)) as store:
        for number in range(MAX_REPLIES + 2):
            store.commit(Changes(reply=replied(f"acme/id-{number}")))
        kept = [store.replay(f"acme/id-{number}", "Register", SHA) is not None for number in (0, 1, 2, MAX_REPLIES + 1)]
    assert kept == [False, False, True, True]


def test_a_tenant_that_floods_drops_its_own_replies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.control.state.MAX_REPLIES", 3)
    others = [f"{tenant}/id" for tenant in ("acm", "acme-2", "acme.x", "acme0", "beta")]
    with closing(StateStore(None)) as store:
        for request_id in others:
            store.commit(Changes(reply=replied(request_id)))
        for number in range(10):
            store.commit(Changes(reply=replied(f"acme/{number}/x")))
        assert all(store.replay(request_id, "Register", SHA) for request_id in others)
        kept = [number for number in range(10) if store.replay(f"acme/{number}/x", "Register", SHA)]
    assert kept == [7, 8, 9]


def test_commits_of_many_threads_are_all_there(tmp_path: Path) -> None:
    def commit(store: StateStore, name: str) -> None:
        for version in range(1, 11):
            store.commit(Changes(put_registration=registered(AdapterId("default", name, version))))

    with closing(StateStore(tmp_path)) as store:
        threads = [threading.Thread(target=commit, args=(store, f"a{number}")) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store.registrations()) == 60


def test_a_killed_server_keeps_what_it_answered_and_nothing_by_half(tmp_path: Path) -> None:
    draw = random.Random(7)
    answered = 0
    for _ in range(5):
        with committing(tmp_path) as process:
            assert process.stdout is not None
            lines = [next(process.stdout) for _ in range(draw.randint(1, 60))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout
        answered = int([line for line in lines if line.endswith("\n")][-1])
        with closing(StateStore(tmp_path)) as store:
            versions = [row.id.version for row in store.registrations()]
            last = len(versions)
            assert versions == list(range(1, last + 1))
            assert answered <= last <= answered + 1, "one commit may be durable and not yet printed"
            assert store.pins() == {AdapterId("default", "news", version) for version in versions}
            assert store.aliases() == [Alias("default", "news", "prod", last)]
            assert all(store.replay(str(number), "Register", str(number)) for number in versions)
            assert store.replay(str(last + 1), "Register", str(last + 1)) is None
    assert answered > 10


def test_two_servers_cannot_share_a_folder(tmp_path: Path) -> None:
    with committing(tmp_path) as process:
        assert process.stdout is not None
        next(process.stdout)
        with pytest.raises(StateError, match="used by another server; stop that one") as refused:
            StateStore(tmp_path)
        assert str(tmp_path) in refused.value.message
        process.kill()
        process.wait()
        StateStore(tmp_path).close()  # a killed server leaves no lock behind


def test_a_store_lets_go_of_its_folder(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    with pytest.raises(StateError):
        StateStore(tmp_path)
    store.close()
    store.close()
    StateStore(tmp_path).close()
    with pytest.raises(StateUnavailable):
        store.commit(Changes(put_registration=registered(NEWS)))


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(StateError, match="name a directory that can be written"):
            StateStore(folder)


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_a_new_folder_is_its_owners_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "above" / "state"
    with closing(StateStore(folder)) as store:
        store.commit(Changes(put_registration=registered(NEWS)))
        modes = {path.name: path.stat().st_mode & 0o777 for path in (folder.parent, folder, *folder.iterdir())}
    files = {STATE_FILE: 0o600, f"{STATE_FILE}-wal": 0o600, f"{STATE_FILE}-shm": 0o600, "lock": 0o600}
    assert modes == {"above": 0o755, "state": 0o700, **files}
    StateStore(folder).close()
    assert not caplog.records


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o755])
def test_a_folder_that_others_can_read_is_told_and_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    StateStore(tmp_path / "state").close()
    (line,) = caplog.messages
    assert str(tmp_path / "state") in line and f"{mode:04o}" in line and "chmod 700" in line
    assert (tmp_path / "state").stat().st_mode & 0o777 == mode


def damage_text(path: Path) -> None:
    path.write_bytes(b"not a database" * 500)


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def damage_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)


def damage_what_is_not_read_at_start(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + b"\xff" * 4096)  # a page of replies


def damage_row(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE registrations SET name = '../etc' WHERE version = 1")
        database.commit()


@pytest.mark.parametrize(
    "damage",
    [damage_text, damage_empty, damage_cut, damage_page, damage_what_is_not_read_at_start, damage_row],
)
def test_a_damaged_database_is_refused_and_left_alone(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with closing(StateStore(tmp_path)) as store:
        for version in range(1, 60):
            store.commit(Changes(put_registration=registered(AdapterId("default", "news", version), "n" * 300)))
        for number in range(10):
            store.commit(Changes(reply=replied(f"id-{number}", b"x" * 3000)))
    path = tmp_path / STATE_FILE
    damage(path)
    before = path.read_bytes()
    for _ in range(2):  # the failure let go of the folder
        with pytest.raises(StateError, match=r"damaged.*restore it from a backup") as refused:  # noqa: SIM117
            with closing(StateStore(tmp_path)) as store:
                store.registrations()
        assert str(path) in refused.value.message
    assert path.read_bytes() == before


def test_a_log_without_its_database_is_not_applied_to_a_new_one(tmp_path: Path) -> None:
    (tmp_path / f"{STATE_FILE}-wal").write_bytes(b"left alone")
    with pytest.raises(StateError, match="is missing"):
        StateStore(tmp_path)
    assert not (tmp_path / STATE_FILE).exists()


def test_a_creation_that_was_killed_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f"{STATE_FILE}.new").write_bytes(b"half")
    with closing(StateStore(tmp_path)) as store:
        store.commit(Changes(put_registration=registered(NEWS)))
        assert store.registrations() == [registered(NEWS)]


def test_the_database_of_a_newer_server_is_refused(tmp_path: Path) -> None:
    StateStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / STATE_FILE)) as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(StateError, match=r"newer server \(schema 7, this one knows 1\); start that version"):
        StateStore(tmp_path)


def test_a_full_disk_refuses_a_change_wholly_and_the_next_one_works(tmp_path: Path) -> None:
    kept = registered(NEWS)
    new = AdapterId("default", "large", 1)
    with closing(StateStore(tmp_path)) as store:
        store.commit(Changes(put_registration=kept))
        large = Changes(
            put_registration=registered(new, "u" * 50),
            put_aliases=(Alias("default", "large", "default", 1),),
            set_pin=(new, True),
            reply=replied("id-1", b"x" * 1_000_000),
        )
        with largest_file(100_000), pytest.raises(StateUnavailable, match="nothing was changed") as refused:
            store.commit(large)
        assert str(tmp_path) not in refused.value.message
        assert store.registrations() == [kept]
        assert not store.pins()
        assert store.replay("id-1", "Register", SHA) is None
        store.commit(large)
    with closing(StateStore(tmp_path)) as store:
        assert store.registrations() == [registered(new, "u" * 50), kept]
        assert store.pins() == {new}
