"""Which tokenizer an adapter's texts go through."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_runtime.adapters.folder import open_folder
from lora_runtime.adapters.tokenizer import tokenizer_identity
from lora_runtime.errors import AdapterRejected
from lora_runtime.model import encoders as module
from lora_runtime.model.encoders import Encoders
from lora_runtime.types import AdapterCard, AdapterId, AdapterInfo, AdapterState, ProblemType, Task
from tests.text_encoders import make_encoder, make_tokenizer


def save(folder: Path, family: str = "gpt2", new_token: str | None = None) -> Path:
    """An adapter's folder with a tokenizer of its own."""
    folder.mkdir()
    make_tokenizer(family).save_pretrained(folder)
    if new_token:
        content = json.loads((folder / "tokenizer.json").read_text())
        size = len(content["model"]["vocab"])
        token = {"id": size, "content": new_token, "single_word": False, "lstrip": False, "rstrip": False}
        content["added_tokens"].append(token | {"normalized": False, "special": False})
        (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such"}')
    (folder / "adapter_model.safetensors").touch()  # read by nobody here
    return folder


def info(folder: Path, digest: str | None = "", card: bool = True) -> AdapterInfo:
    """`digest` empty: that of the folder's files."""
    if digest == "":
        digest = tokenizer_identity(open_folder(folder))
    known = AdapterCard(Task.CLASSIFY, None, ProblemType.SINGLE_LABEL, None, None, None, tokenizer_sha256=digest)
    return AdapterInfo(
        AdapterId("default", folder.name, 1), str(folder), folder, AdapterState.READY, known if card else None
    )


@pytest.fixture
def encoders() -> Encoders:
    return Encoders(make_encoder("bert", max_length=64))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that a tokenizer was loaded from."""
    folders: list[str] = []
    load: Any = module.AutoTokenizer.from_pretrained

    def counting(folder: str, **options: object) -> object:
        folders.append(Path(folder).name)
        return load(folder, **options)

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", counting)
    return folders


def test_an_adapter_without_a_tokenizer_uses_the_bases(encoders: Encoders, tmp_path: Path) -> None:
    assert encoders.for_adapter(info(tmp_path, None)) is encoders.base
    assert encoders.for_adapter(info(tmp_path, None, card=False)) is encoders.base


def test_an_adapters_own_tokenizer_is_used_within_the_bases_length(encoders: Encoders, tmp_path: Path) -> None:
    folder = save(tmp_path / "own", new_token="[DOSE]")
    encoder = encoders.for_adapter(info(folder))
    (tokenised,) = encoder.encode_tokens(["a[DOSE]b"], max_length=None, truncate=False)
    assert tokenised.offsets == ((0, 1), (1, 7), (7, 8))
    assert encoder.max_length == 64


def test_the_tokenizer_of_a_named_adapter_is_found_in_its_sub_folder(encoders: Encoders, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    inner = save(tmp_path / "outer" / "named", new_token="[DOSE]")
    digest = tokenizer_identity(open_folder(inner))
    assert encoders.for_adapter(info(tmp_path / "outer", digest)).encode_tokens(["a"], max_length=None, truncate=False)


def test_a_link_out_of_the_folder_is_not_followed(encoders: Encoders, tmp_path: Path) -> None:
    folder = save(tmp_path / "own")
    registered = info(folder)
    outside = (folder / "tokenizer_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "tokenizer_config.json").symlink_to(outside)
    with pytest.raises(AdapterRejected, match="leaves the folder"):
        encoders.for_adapter(registered)


@pytest.mark.parametrize(("base", "own"), [("bert", "roberta"), ("roberta", "xlnet")])
def test_sequences_have_token_types_where_the_bases_have(base: str, own: str, tmp_path: Path) -> None:
    encoder = Encoders(make_encoder(base)).for_adapter(info(save(tmp_path / "own", own)))
    (sequence,) = encoder.encode([("Leo", "Tolstoy")], max_length=None, truncate=False)
    assert (sequence.token_type_ids is not None) == (base == "bert")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_changed_since_its_registration_is_refused(
    name: str, encoders: Encoders, tmp_path: Path
) -> None:
    folder = save(tmp_path / "own")
    registered = info(folder)
    with (folder / name).open("a") as file:
        file.write("\n")
    with pytest.raises(AdapterRejected, match="new version") as caught:
        encoders.for_adapter(registered)
    assert (caught.value.code, caught.value.where) == ("DIGEST_MISMATCH", "tokenizer.json")


def test_a_tokenizer_that_cannot_be_read_is_refused_until_it_is_mended(encoders: Encoders, tmp_path: Path) -> None:
    folder = save(tmp_path / "own")
    registered, file = info(folder), folder / "tokenizer.json"
    file.rename(folder / "elsewhere")
    with pytest.raises(AdapterRejected) as caught:
        encoders.for_adapter(registered)
    assert caught.value.code == "FILES_UNREADABLE"
    (folder / "elsewhere").rename(file)
    assert encoders.for_adapter(registered) is encoders.for_adapter(registered)


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"added_tokens": [], "model": {"type": "Unheard"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(content: str, encoders: Encoders, tmp_path: Path) -> None:
    folder = save(tmp_path / "own")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(AdapterRejected) as caught:
        encoders.for_adapter(info(folder))
    assert caught.value.code == "TOKENIZER_UNSUPPORTED"


def test_code_in_the_folder_is_neither_run_nor_asked_about(
    encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "own")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Slow", "evil.Fast"]}, "tokenizer_class": "Unheard"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(AdapterRejected) as caught:
        encoders.for_adapter(info(folder))
    assert caught.value.code == "TOKENIZER_UNSUPPORTED"


def test_adapters_with_the_same_tokenizer_share_it(encoders: Encoders, tmp_path: Path, loads: list[str]) -> None:
    first, second = (info(save(tmp_path / name)) for name in ("first", "second"))
    assert encoders.for_adapter(first) is encoders.for_adapter(second)
    assert loads == ["first"]


def test_one_vocabulary_under_other_settings_is_another_tokenizer(encoders: Encoders, tmp_path: Path) -> None:
    """Whichever is asked for first: an adapter must not be read by the settings of another."""
    found: list[tuple[int, ...]] = []
    for name, lower in (("first", True), ("second", False)):
        folder = save(tmp_path / name, "bert")
        settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        encoder = encoders.for_adapter(info(folder))
        found.append(encoder.encode([("LEO", None)], max_length=None, truncate=False)[0].input_ids)
    assert found[0] != found[1]


def test_threads_that_ask_at_once_load_once(encoders: Encoders, tmp_path: Path, loads: list[str]) -> None:
    registered, gate = info(save(tmp_path / "own")), threading.Barrier(8)

    def ask(_: int) -> object:
        gate.wait(10)
        return encoders.for_adapter(registered)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(map(id, threads.map(ask, range(8))))) == 1
    assert loads == ["own"]


def test_those_who_wait_for_a_load_learn_of_its_failure(
    encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def failing(*_: object, **__: object) -> object:
        entered.set()
        assert leave.wait(10)
        raise ValueError("broken")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", failing)
    registered = info(save(tmp_path / "own"))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(encoders.for_adapter, registered)
        assert entered.wait(10)
        second = threads.submit(encoders.for_adapter, registered)
        leave.set()
        for future in (first, second):
            assert isinstance(future.exception(10), AdapterRejected)


def test_the_tokenizer_used_least_recently_goes_first(
    encoders: Encoders, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    a, b, c = (info(save(tmp_path / name, new_token=f"[{name}]")) for name in "abc")
    for registered in (a, b, a, c, a, b):
        encoders.for_adapter(registered)
    assert loads == ["a", "b", "c", "b"]
