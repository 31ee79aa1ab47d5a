"""Adapters of the Hugging Face hub: `hf://org/name[@revision][/sub/folder]`, pinned to a commit."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from lora_runtime.adapters.sources.api import Origin
from lora_runtime.adapters.sources.faults import at_store
from lora_runtime.adapters.sources.names import check_inside, check_size, select_files
from lora_runtime.adapters.sources.urls import shown_url
from lora_runtime.errors import AdapterRejected, LoadCancelled, SourceUnavailable

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_URL = re.compile(rf"hf://(?P<repo>{_PART}/{_PART})(@(?P<revision>[^/@]+))?(/(?P<folder>.*))?", re.IGNORECASE)
_TIMEOUT_S = 30.0
_STATE = ".hub"  # where huggingface_hub writes, and keeps what it needs to resume


class HubSource:
    """Credentials, proxies and an endpoint of one's own are those huggingface_hub reads from the environment."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint  # None: the hub's own, or HF_ENDPOINT

    def resolve(self, url: str, stop: threading.Event) -> Origin:
        """Ask for the commit that the revision, or the main branch, is at."""
        repo, revision, folder = _parse(url)
        _check(stop, url)
        with at_store(url):
            commit = self._api().model_info(repo, revision=revision, timeout=_TIMEOUT_S).sha
        if not commit:
            raise SourceUnavailable(shown_url(url), "answered without a commit")
        return Origin(f"hf://{repo}{f'/{folder}' if folder else ''}", commit)

    def fetch(self, origin: Origin, into: Path, max_bytes: int, stop: threading.Event) -> None:
        """Download the adapter's files of the pinned commit; those of a sub-folder come to lie in `into` itself."""
        repo, _, folder = _parse(origin.url)
        prefix = f"{folder}/" if folder else ""
        sizes = self._sizes(repo, prefix, origin)
        chosen = select_files(sizes, shown_url(origin.url))
        check_size(sum(sizes[name] for name in chosen), max_bytes, shown_url(origin.url))
        for name in chosen:
            _check(stop, origin.url)
            target = into / name
            if not (target.is_file() and target.stat().st_size == sizes[name]):
                downloaded = self._download(repo, prefix + name, origin, into / _STATE, stop)
                _place(downloaded, target, sizes[name], origin.url)
        shutil.rmtree(into / _STATE, ignore_errors=True)

    def _sizes(self, repo: str, prefix: str, origin: Origin) -> dict[str, int]:
        """Bytes of the commit's files below `prefix`, by name below it."""
        with at_store(origin.url):
            info = self._api().model_info(repo, revision=origin.revision, files_metadata=True, timeout=_TIMEOUT_S)
        sizes = {file.rfilename: file.size for file in info.siblings or [] if file.rfilename.startswith(prefix)}
        if any(size is None for size in sizes.values()):
            raise SourceUnavailable(shown_url(origin.url), "was listed without sizes")
        return {name.removeprefix(prefix): size or 0 for name, size in sizes.items()}

    def _download(self, repo: str, name: str, origin: Origin, into: Path, stop: threading.Event) -> Path:
        progress = _stopping_progress(stop, origin.url)
        with at_store(origin.url):
            path = self._api().hf_hub_download(
                repo, name, revision=origin.revision, local_dir=into, tqdm_class=progress
            )  # fmt: skip
        return Path(str(path))

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi  # slow to import, and only hf:// needs it

        return HfApi(endpoint=self._endpoint)


def _parse(url: str) -> tuple[str, str | None, str]:
    """The repository, the revision, and the folder in it (empty for its root)."""
    match = _URL.fullmatch(url.rstrip("/"))
    if match is None:
        message = "is not of the form hf://org/name[@revision][/sub/folder]"
        raise AdapterRejected("SOURCE_UNSUPPORTED", shown_url(url), message)
    revision, folder = match["revision"], (match["folder"] or "").strip("/")
    if folder:
        check_inside(folder, shown_url(url))
    return match["repo"], unquote(revision) if revision else None, folder


def _place(downloaded: Path, target: Path, num_bytes: int, url: str) -> None:
    if downloaded.stat().st_size != num_bytes:
        downloaded.unlink()
        raise SourceUnavailable(shown_url(url), f"{target.name} came with another size than was listed")
    target.parent.mkdir(exist_ok=True)
    downloaded.replace(target)


def _stopping_progress(stop: threading.Event, url: str) -> type[Any]:
    """A progress bar that shows nothing: its update is where a download under way can be given up."""
    from huggingface_hub.utils import tqdm

    class Progress(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            _check(stop, url)
            return super().update(n)

    return Progress


def _check(stop: threading.Event, url: str) -> None:
    if stop.is_set():
        raise LoadCancelled(shown_url(url))
