"""Writing an adapter folder: built aside under a hidden name, published by one rename, or not at all."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.digests import file_digests
from lora_runtime.adapters.folder import WEIGHTS_FILE
from lora_runtime.adapters.metadata import AdapterMetadata
from lora_runtime.errors import InvalidRequest


@contextmanager
def staged_folder(out: Path, *, overwrite: bool) -> Generator[Path]:
    """An empty folder beside `out` that takes its place when the block ends, and vanishes when it raises.

    Its name begins with a dot, which no adapter's may, so a server that watches the parent passes it over.
    Raises InvalidRequest, before the block, when `out` may not be replaced or its parent cannot be written.
    """
    out = out.absolute()
    check_replaceable(out, overwrite=overwrite)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise InvalidRequest("out", f"{out.parent} cannot be written ({error.strerror})") from error
    try:
        yield staging
        check_replaceable(out, overwrite=overwrite)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Raise InvalidRequest unless `out` is absent, empty, or, with `overwrite`, an adapter's folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InvalidRequest("out", f"{out} exists and is not a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise InvalidRequest("out", f"{out} is not empty; choose another folder, or set overwrite")
    if not (out / CONFIG_FILE).is_file():
        raise InvalidRequest("out", f"{out} holds something else than an adapter, and is not overwritten")


def _publish(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    old = staging.with_suffix(".replaced")
    out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_config(folder: Path, values: Mapping[str, object]) -> None:
    """Write adapter_config.json, in an order that does not change from run to run."""
    ordered = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(values.items())}
    (folder / CONFIG_FILE).write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def write_metadata(folder: Path, metadata: AdapterMetadata) -> None:
    """Write multilora.json with the digests of the config, the weights, and those files that it names and are there."""
    named = {name for name in metadata.digests if (folder / name).is_file()}
    digests = file_digests(folder, {CONFIG_FILE, WEIGHTS_FILE} | named)
    metadata.model_copy(update={"digests": digests}).write(folder)
