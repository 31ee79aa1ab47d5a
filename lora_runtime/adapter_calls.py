"""What any thread may ask of the engine about adapters: each call is a message, and its answer a future."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.catalogue import Catalogue
from lora_runtime.futures import settle
from lora_runtime.mailbox import Mailbox
from lora_runtime.residency import Residency
from lora_runtime.types import AdapterId, AdapterInfo, Alias, Unloaded


class AdapterCalls:
    """Nothing here blocks; what goes wrong is in the future."""

    def __init__(self, mailbox: Mailbox, residency: Residency) -> None:
        self._mailbox = mailbox
        self._residency = residency

    @property
    def catalogue(self) -> Catalogue:
        """The registered adapters; safe to read from any thread."""
        return self._residency.catalogue

    def register(
        self, adapter: AdapterId, origin: Origin | Path, *, examine: bool = True, keep_failed: bool = False
    ) -> Future[AdapterInfo]:
        """List an adapter; no weights are read.

        With `examine` the JSON files and headers of a local folder are read first, and the future fails with
        AdapterRejected; with `keep_failed` a rejected one is listed as FAILED all the same, for operators to see.
        Without, it is listed at once and examined when there is time, or when it is asked for. The future fails with
        AdapterAlreadyExists, InvalidRequest.
        """
        where = Origin(str(origin)) if isinstance(origin, Path) else origin
        return self._mailbox.ask(
            lambda future: self._residency.register(adapter, where, future, examine=examine, keep_failed=keep_failed)
        )

    def examine(self, adapter: AdapterId) -> Future[AdapterInfo]:
        """Read the JSON files of a folder again, if it is not loaded; the future has the snapshot after that."""
        return self._mailbox.ask(lambda future: self._residency.examine(adapter, future))

    def prefetch(self, adapter: AdapterId) -> Future[AdapterInfo]:
        """Start a load if there is none; the future has the snapshot once card and files are there.

        Fails with AdapterNotFound, AdapterFailed.
        """
        return self._mailbox.ask(lambda future: self._residency.prefetch(adapter, future))

    def load(self, adapter: AdapterId) -> Future[AdapterInfo]:
        """Bring an adapter to READY; a FAILED one is tried again. Fails with AdapterNotFound, AdapterFailed."""
        return self._mailbox.ask(lambda future: self._residency.load(adapter, future))

    def pin(self, adapter: AdapterId, *, pinned: bool = True) -> Future[AdapterInfo]:
        """Load an adapter and keep it in memory, or let it be evicted again. Fails as `load`: then it is not pinned."""
        return self._mailbox.ask(lambda future: self._residency.pin(adapter, future, pinned=pinned))

    def unload(self, adapter: AdapterId) -> Future[Unloaded]:
        """Free an adapter's memory between two steps. Requests that still come load it again.

        Fails with AdapterNotFound, AdapterInUse (it is pinned).
        """
        return self._mailbox.ask(lambda future: self._residency.unload(adapter, future))

    def delete(self, adapter: AdapterId, *, force: bool = False) -> Future[Unloaded]:
        """Forget a version, once the requests that wait for it are answered; `force`: its pin and aliases too.

        Fails with AdapterNotFound, AdapterInUse.
        """
        return self._mailbox.ask(lambda future: self._residency.delete(adapter, future, force=force))

    def set_alias(self, alias: Alias) -> Future[Alias]:
        """Publish an alias between two steps, as it is given (see Catalogue.moved_alias).

        Fails with AdapterNotFound for a version that is not registered.
        """
        return self._mailbox.ask(lambda future: settle(future, self._residency.set_alias(alias)))

    def delete_alias(self, tenant: str, name: str, alias: str) -> Future[Alias]:
        """Remove an alias. Fails with AdapterNotFound, AliasNotFound, InvalidRequest."""
        return self._mailbox.ask(lambda future: settle(future, self._residency.delete_alias(tenant, name, alias)))
