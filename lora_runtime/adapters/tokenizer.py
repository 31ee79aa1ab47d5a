"""An adapter's own tokenizer.json: whether it differs from the base's, and which token ids it can give."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.digests import content_digest
from lora_runtime.adapters.folder import AdapterFolder
from lora_runtime.adapters.metadata import parse_json_object
from lora_runtime.errors import AdapterRejected

TOKENIZER_FILE = "tokenizer.json"
ADDED_TOKENS_FILE = "added_tokens.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
# all that change what ids a text has
TOKENIZER_FILES = (TOKENIZER_FILE, _CONFIG_FILE, "special_tokens_map.json", ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE)
MAX_TOKENIZER_BYTES = 128 << 20

_MAX_FACTS = 1000
_FACTS: dict[str, tuple[str, int]] = {}  # by SHA-256 of the file: a tokenizer of 100 000 tokens takes 0.1 s to parse


def tokenizer_digest(content: str | bytes) -> str:
    """SHA-256 over the canonical JSON of a tokenizer, but for its `truncation` and `padding`.

    Those two are what the last call left behind; how merges are written, and which fields at
    their default, depends on the version that saved them.
    """
    return _digest(json.loads(content))


def _digest(tokenizer: dict[str, Any]) -> str:
    kept = {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")}
    if isinstance(model := kept.get("model"), dict):
        merges = model.get("merges")
        pairs = [" ".join(m) if isinstance(m, list) else m for m in merges] if isinstance(merges, list) else merges
        plain = {key: value for key, value in model.items() if value is not None and value is not False}
        kept["model"] = plain | {"merges": pairs}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def own_tokenizer(folder: AdapterFolder, base: BaseSpec, num_rows: int) -> str | None:
    """The identity of the folder's own tokenizer when its tokenizer.json differs from the base's, else None.

    `num_rows` are those of the embedding the adapter uses. Raises AdapterRejected when a token id has no row.
    """
    data = folder.peek(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    if data is None:
        _check_added_tokens(folder, num_rows)
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    digest, num_ids = _facts(sha256, data)
    if digest == base.tokenizer_digest and not _generates_otherwise(folder, base):
        return None
    _check_rows(TOKENIZER_FILE, num_ids, num_rows)
    for name in TOKENIZER_FILES:
        if (content := folder.peek(name, MAX_TOKENIZER_BYTES)) is not None:
            folder.count(name, content)
    return tokenizer_identity(folder)


def _generates_otherwise(folder: AdapterFolder, base: BaseSpec) -> bool:
    """Whether the files beside a decoder's own tokenizer.json name another chat template, or another end of a text.

    A trainer of conversations leaves the vocabulary as it is and saves its template and EOS token.
    """
    if not base.is_decoder:
        return False
    found = folder.peek(_CONFIG_FILE)
    config: dict[str, Any] = {} if found is None else parse_json_object(found, _CONFIG_FILE)
    data = folder.peek(CHAT_TEMPLATE_FILE, MAX_TOKENIZER_BYTES)
    template = data.decode("utf-8", "replace") if data is not None else config.get("chat_template")
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return template not in (None, base.chat_template) or end not in (None, base.eos_token)


def tokenizer_identity(folder: AdapterFolder) -> str:
    """SHA-256 over all files that a folder's tokenizer is made from."""
    found = ((name, folder.peek(name, MAX_TOKENIZER_BYTES)) for name in TOKENIZER_FILES)
    files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in found if data is not None}
    return content_digest(files)


def _facts(sha256: str, data: bytes) -> tuple[str, int]:
    """(canonical digest, one more than the highest token id); the adapters of one trainer share a tokenizer."""
    facts = _FACTS.get(sha256)
    if facts is None:
        tokenizer = parse_json_object(data, TOKENIZER_FILE)
        if len(_FACTS) >= _MAX_FACTS:  # another loader thread may clear them at any time
            _FACTS.clear()
        facts = _FACTS[sha256] = _digest(tokenizer), _num_ids(tokenizer)
    return facts


def _num_ids(tokenizer: dict[str, Any]) -> int:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens") or []
    try:
        ids = [int(token["id"]) for token in added]
        if isinstance(vocabulary, dict):
            ids += vocabulary.values()
        elif isinstance(vocabulary, list):  # Unigram: pairs of piece and score, by id
            ids.append(len(vocabulary) - 1)
        return max(ids, default=-1) + 1
    except (TypeError, KeyError, ValueError) as error:
        message = "holds no vocabulary and added_tokens as tokenizers saves them"
        raise AdapterRejected("TOKENIZER_UNSUPPORTED", TOKENIZER_FILE, message) from error


def _check_added_tokens(folder: AdapterFolder, num_rows: int) -> None:
    data = folder.peek(ADDED_TOKENS_FILE)
    if data is None:
        return
    ids = [value for value in parse_json_object(data, ADDED_TOKENS_FILE).values() if isinstance(value, int)]
    _check_rows(ADDED_TOKENS_FILE, max(ids, default=-1) + 1, num_rows)


def _check_rows(file: str, num_ids: int, num_rows: int) -> None:
    if num_ids > num_rows:
        missing = num_ids - num_rows
        raise AdapterRejected(
            "TOKENIZER_UNSUPPORTED",
            file,
            f"has token ids up to {num_ids - 1}, the embedding has {num_rows} rows: {missing} are missing; save the "
            "adapter with its resized embedding (save_embedding_layers in PEFT's save_pretrained)",
        )
