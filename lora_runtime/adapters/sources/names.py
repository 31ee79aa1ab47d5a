"""Which files of a store or of the hub are an adapter's: others are never downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from lora_runtime.adapters.config import CONFIG_FILE
from lora_runtime.adapters.folder import BASE_CONFIG_FILE, INDEX_FILE, PICKLE_FILES, WEIGHTS_FILE
from lora_runtime.adapters.metadata import METADATA_FILE
from lora_runtime.adapters.pooling import MODULES_FILE, POOLING_FILE
from lora_runtime.adapters.tokenizer import ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE, TOKENIZER_FILE
from lora_runtime.errors import AdapterRejected

_TOKENIZER_FILES = (
    TOKENIZER_FILE, ADDED_TOKENS_FILE, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "vocab.txt",
    "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", CHAT_TEMPLATE_FILE,
)  # fmt: skip
KNOWN_FILES = (
    CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, METADATA_FILE, BASE_CONFIG_FILE, MODULES_FILE, POOLING_FILE,
    *_TOKENIZER_FILES,
)  # fmt: skip
_WEIGHTS = "adapter_model*.safetensors"
_UNSAFE = re.compile(r"[\x00\\]|(^|/)\.{0,2}(/|$)")  # an empty part, `.` or `..`: out of the folder, or absolute
MAX_FILES = 2000


def select_files(names: Iterable[str], where: str) -> list[str]:
    """Those of an adapter: of the folder, or where that has no adapter_config.json of its sub-folders, sorted.

    Raises AdapterRejected where a name leads out of the folder, there is no adapter, or only a pickle of one.
    """
    names = sorted(names)
    for name in names:
        check_inside(name, where)
    if not names:
        raise AdapterRejected("SOURCE_MISSING", where, "has no files; check the URL")
    top = CONFIG_FILE in names
    chosen = [name for name in names if _is_known(name, top)]
    if not any(name.rpartition("/")[2] == CONFIG_FILE for name in chosen):
        raise AdapterRejected("SOURCE_MISSING", where, f"has no {CONFIG_FILE}{_hint(names)}")
    if not any(fnmatch(name, f"*{_WEIGHTS}") for name in chosen):
        pickle = next((name for name in names if fnmatch(name.rpartition("/")[2], PICKLE_FILES)), None)
        if pickle:
            message = f"{pickle} is a pickle, which can run code and is never read; save {WEIGHTS_FILE} instead"
            raise AdapterRejected("PICKLE", where, message)
    if len(chosen) > MAX_FILES:
        raise AdapterRejected("SOURCE_TOO_LARGE", where, f"has {len(chosen)} files, {MAX_FILES} are read")
    return chosen


def check_inside(name: str, where: str) -> None:
    """Raise AdapterRejected when a file of this name would lie outside of the folder it is written to."""
    if _UNSAFE.search(name) or any(len(part.encode(errors="replace")) > 255 for part in name.split("/")):
        raise AdapterRejected("SOURCE_NAME", where, f"has a file called {name[:200]!r}, which leads out of its folder")


def check_size(num_bytes: int, max_bytes: int, where: str) -> None:
    """Raise AdapterRejected above the limit, before anything is downloaded."""
    if num_bytes > max_bytes:
        raise AdapterRejected(
            "SOURCE_TOO_LARGE", where, f"has {num_bytes} bytes of an adapter's files, the limit is {max_bytes}"
        )


def _is_known(name: str, top: bool) -> bool:
    if top:
        return name in KNOWN_FILES or ("/" not in name and fnmatch(name, _WEIGHTS))
    base = name.rpartition("/")[2]
    return name.count("/") <= 1 and (base in KNOWN_FILES or fnmatch(base, _WEIGHTS))


def _hint(names: list[str]) -> str:
    below = sorted({name.rpartition("/")[0] for name in names if name.endswith(f"/{CONFIG_FILE}")})
    return f"; these folders of it have one: {', '.join(below[:10])}" if below else "; check the URL"
