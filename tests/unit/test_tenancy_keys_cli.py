"""`multilora keys`: a key is printed once, and never again."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.tenancy.keys import KeyRing, read_keys
from server.tenancy.model import Role

runner = CliRunner()


def keys(*arguments: str) -> Result:
    return runner.invoke(app, ["keys", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def create(file: str, *more: str) -> Result:
    return keys("create", "--file", file, "--tenant", "acme", "--roles", "infer,adapters", *more)


def test_the_printed_key_works(file: str) -> None:
    done = create(file, "--note", "ci")
    assert done.exit_code == 0
    principal = KeyRing(read_keys(Path(file))).verify(done.stdout.strip(), time.time())
    assert principal is not None
    assert principal.roles == {Role.INFER, Role.ADAPTERS}
    assert "not shown again" in done.stderr
    assert done.stdout.strip() not in done.stderr


def test_quiet_prints_the_key_alone(file: str) -> None:
    done = create(file, "--quiet")
    assert done.stdout.startswith("ml_")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def test_json_has_the_key_and_its_facts(file: str) -> None:
    facts = json.loads(create(file, "--json", "--expires", "90d").stdout)
    assert facts["key"].startswith(f"ml_{facts['id']}_")
    assert facts["roles"] == ["adapters", "infer"]
    assert facts["state"] == "active"
    assert facts["expires"] > facts["created"]
    assert not {"salt", "digest"} & set(facts)


def test_list_shows_no_secret(file: str) -> None:
    token = create(file, "--note", "[bold]ci[/]").stdout.strip()
    stored = read_keys(Path(file))[0]
    for done in (keys("list", "--file", file), keys("list", "--file", file, "--json")):
        assert done.exit_code == 0
        assert stored.id in done.stdout
        assert "[bold]ci[/]" in done.stdout
        for secret in (token, token.split("_", 2)[2], stored.salt, stored.digest):
            assert secret not in done.stdout


def test_a_revoked_key_is_listed_as_such(file: str) -> None:
    token = create(file).stdout.strip()
    stored = read_keys(Path(file))[0]
    done = keys("revoke", stored.id, "--file", file)
    assert done.exit_code == 0
    assert "revoked" in keys("list", "--file", file).stdout
    assert KeyRing(read_keys(Path(file))).verify(token, time.time()) is None


def test_a_whole_key_can_be_revoked_too_and_is_not_repeated(file: str) -> None:
    token = create(file).stdout.strip()
    done = keys("revoke", token, "--file", file)
    assert done.exit_code == 0
    assert token not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tenant", "../acme"), "--tenant: "),
        (("--roles", "root"), "--roles: 'root'"),
        (("--roles", ","), "--roles: name at least one"),
        (("--expires", "soon"), "--expires: 'soon'"),
        (("--expires", "0d"), "--expires: '0d'"),
        (("--note", "x" * 201), "--note: at most 200"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(file: str, arguments: tuple[str, str], message: str) -> None:
    done = create(file, *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("multilora keys create: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path(file).exists()


def test_a_file_that_is_not_there_is_one_line_and_exit_1(file: str) -> None:
    for done in (keys("list", "--file", file), keys("revoke", "aaaaaaaaaaaa", "--file", file)):
        assert done.exit_code == 1
        assert "keys create" in done.stderr
        assert done.stderr.count("\n") == 1
