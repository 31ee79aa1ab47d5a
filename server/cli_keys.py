"""`multilora keys …`: API keys, in the file that the server's auth file names."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.tenancy.auth_file import AuthFileError
from server.tenancy.keys import MAX_NOTE_CHARS, KeyStore, StoredKey, utc_now
from server.tenancy.model import Role

keys_app = typer.Typer(
    help="Create, list and revoke API keys; a running server follows within seconds.",
    no_args_is_help=True,
    add_completion=False,
)

_PERIOD = re.compile(r"([1-9][0-9]{0,4})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}
_MIN_WIDTH = 110

_File = Annotated[Path, typer.Option("--file", help="The file of keys.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


@keys_app.command(no_args_is_help=True)
def create(
    file: _File,
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    roles: Annotated[str, typer.Option(help="What it allows, separated by commas: infer, adapters, operator.")],
    expires: Annotated[
        str | None, typer.Option(help="How long it is good, such as 90d, 12h or 30m. Default: for good.")
    ] = None,
    note: Annotated[str, typer.Option(help="What it is for; shown by `list`.")] = "",
    as_json: _Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the key and nothing else.")] = False,
) -> None:
    """Create a key and print it. It is shown this once: the file keeps only what recognises it."""
    now = utc_now()
    try:
        ends = None if expires is None else now + _period(expires)
        token, key = KeyStore(file).create(tenant, _roles(roles), now, ends, note)
    except ValidationError as error:
        _refuse("create", "\n".join(f"--{fault['loc'][0]}: {_text(fault)}" for fault in error.errors()), 2)
    except ValueError as error:
        _refuse("create", str(error), 2)
    except AuthFileError as error:
        _refuse("create", str(error), 1)
    if as_json:
        typer.echo(json.dumps({"key": token, **_facts(key, now)}, indent=2, ensure_ascii=False))
        return
    typer.echo(token)
    if not quiet:
        ends_text = "does not expire" if key.expires is None else f"expires {_shown(key.expires)}"
        typer.echo(f"Key {key.id} of {tenant} ({_role_names(key)}) {ends_text}. It is not shown again.", err=True)


@keys_app.command("list", no_args_is_help=True)
def list_keys(file: _File, as_json: _Json = False) -> None:
    """List keys, oldest first, with no secret."""
    now = utc_now()
    try:
        keys = KeyStore(file).list()
    except AuthFileError as error:
        _refuse("list", str(error), 1)
    if as_json:
        typer.echo(json.dumps([_facts(key, now) for key in keys], indent=2, ensure_ascii=False))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("id", "tenant", "roles", "state", "created", "expires", "note"):
        table.add_column(heading, no_wrap=heading != "note")
    for key in keys:
        expires = "" if key.expires is None else _shown(key.expires)
        row = key.id, key.tenant, _role_names(key), key.state(now), _shown(key.created), expires, key.note
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False)
    console.width = max(console.width, _MIN_WIDTH)
    console.print(table)


@keys_app.command(no_args_is_help=True)
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")], file: _File) -> None:
    """Make a key worthless for good. The server refuses it within seconds."""
    try:
        key = KeyStore(file).revoke(_bare_id(key_id), utc_now())
    except AuthFileError as error:
        _refuse("revoke", str(error), 1)
    assert key.revoked is not None, "a revoked key has no time"
    typer.echo(f"Key {key.id} of {key.tenant} is revoked since {_shown(key.revoked)}.")


def _bare_id(text: str) -> str:
    """Of a whole key too: who has to revoke in a hurry pastes what leaked."""
    return text[3:15] if text.startswith("ml_") else text


def _roles(text: str) -> frozenset[Role]:
    try:
        return frozenset(Role(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"--roles: {text!r} is not of infer, adapters, operator, separated by commas") from error


def _period(text: str) -> timedelta:
    match = _PERIOD.fullmatch(text)
    if match is None:
        raise ValueError(f"--expires: {text!r} is no period; give one such as 90d, 12h or 30m")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _text(fault: Any) -> str:
    if fault["loc"][0] == "roles":
        return "name at least one of infer, adapters, operator"
    if fault["loc"][0] == "note":
        return f"at most {MAX_NOTE_CHARS} characters"
    return str(fault["msg"]).removeprefix("Value error, ")


def _facts(key: StoredKey, now: datetime) -> dict[str, Any]:
    facts = key.model_dump(mode="json", exclude={"salt", "digest"})
    return {**facts, "roles": sorted(facts["roles"]), "state": key.state(now)}


def _role_names(key: StoredKey) -> str:
    return ",".join(sorted(key.roles))


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M}Z"


def _refuse(command: str, text: str, code: int) -> NoReturn:
    typer.echo(f"multilora keys {command}: {text}", err=True)
    raise typer.Exit(code)
