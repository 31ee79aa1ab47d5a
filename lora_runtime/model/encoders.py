"""Which tokenizer an adapter's texts go through: the base's, or the one in the adapter's own folder."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future

from transformers import AutoTokenizer

from lora_runtime.adapters.folder import open_folder
from lora_runtime.adapters.tokenizer import TOKENIZER_FILE, tokenizer_identity
from lora_runtime.errors import AdapterRejected, InvalidRequest
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.model.template_process import TemplateProcess
from lora_runtime.model.text_generation import DecoderFacts, TextGeneration
from lora_runtime.types import AdapterInfo

MAX_CACHED = 64  # encoders beside the base's; each costs its vocabulary once per thread that uses it


class Encoders:
    """The base's encoder, and those of adapters that brought a tokenizer, by the identity of its files.

    Thread-safe. `for_adapter` may read files and then blocks, so it is no call for an event loop. A tokenizer that
    several threads ask for at once is loaded once; the ones used least recently go when there are too many.
    """

    def __init__(self, base: TextEncoder, decoder: DecoderFacts | None = None) -> None:
        self.base = base
        self.decoder = decoder
        self._lock = threading.Lock()
        self._cached: OrderedDict[str, Future[TextEncoder]] = OrderedDict()
        self._renderer = TemplateProcess()
        self._generations: OrderedDict[tuple[str | None, int | None], TextGeneration] = OrderedDict()

    def for_adapter(self, info: AdapterInfo) -> TextEncoder:
        """The encoder of an adapter's texts; its `max_length` is the base's.

        Raises AdapterRejected when the adapter's tokenizer cannot be read, or is not the one that was registered.
        """
        digest = info.card.tokenizer_sha256 if info.card else None
        if digest is None:
            return self.base
        with self._lock:
            future = self._cached.get(digest)
            loads = future is None
            if future is None:
                future = self._cached[digest] = Future[TextEncoder]()
            self._cached.move_to_end(digest)
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        if loads:
            self._load(info, digest, future)
        return future.result()

    def generation_for(self, info: AdapterInfo) -> TextGeneration:
        """What generation with an adapter needs of its tokenizer, kept as its encoder is.

        Blocks and raises as `for_adapter`; InvalidRequest on `adapter` when the base is no decoder.
        """
        if self.decoder is None:
            problem = "the served base is an encoder, which generates no text; ask a server whose base is a decoder"
            raise InvalidRequest("adapter", problem)
        encoder = self.for_adapter(info)
        card = info.card
        key = (card.tokenizer_sha256, card.num_token_ids) if card else (None, None)
        with self._lock:
            found = self._generations.get(key)
            if found is None or found.encoder is not encoder:
                found = TextGeneration(
                    encoder, self.decoder, base=self.base, renderer=self._renderer, vocab_size=key[1]
                )
                self._generations[key] = found
            self._generations.move_to_end(key)
            if len(self._generations) > MAX_CACHED:
                self._generations.popitem(last=False)
            return found

    def _load(self, info: AdapterInfo, digest: str, future: Future[TextEncoder]) -> None:
        """Settle `future`; a failure is not kept, since the folder may be mended."""
        try:
            future.set_result(_read_encoder(info, digest, self.base))
        except BaseException as error:  # whatever it is, those who wait must learn of it
            with self._lock:
                if self._cached.get(digest) is future:
                    del self._cached[digest]
            future.set_exception(error)
            raise


def _read_encoder(info: AdapterInfo, digest: str, base: TextEncoder) -> TextEncoder:
    try:
        if info.path is None:  # those of a URL were fetched, and left the disk again
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        opened = open_folder(info.path)  # config.json is no link out of it, nor is any file of the tokenizer
        path = opened.find(TOKENIZER_FILE)  # in the folder, or in the sub-folder of a named adapter
        if path is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        found = tokenizer_identity(opened)
    except OSError as error:
        message = f"cannot be read ({error.strerror or type(error).__name__}); put it back or register the adapter anew"
        raise AdapterRejected("FILES_UNREADABLE", TOKENIZER_FILE, message) from error
    if found != digest:
        message = "or a file beside it changed since the adapter was registered; register what changed as a new version"
        raise AdapterRejected("DIGEST_MISMATCH", TOKENIZER_FILE, message)
    try:
        # Code that a folder brings is not run; left at its default, the option would ask at the terminal.
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises the bare Exception on a file it cannot parse
        reason = type(error).__name__
        raise AdapterRejected("TOKENIZER_UNSUPPORTED", TOKENIZER_FILE, f"cannot be loaded ({reason})") from error
    if not getattr(tokenizer, "is_fast", False):
        message = "is not used by the tokenizer class that the folder names, which is no fast one"
        raise AdapterRejected("TOKENIZER_UNSUPPORTED", TOKENIZER_FILE, message)
    return base.with_tokenizer(tokenizer)
