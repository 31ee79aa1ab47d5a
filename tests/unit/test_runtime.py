"""The library alone: load, classify, refuse; and the threads it starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_runtime.errors import (
    AdapterAlreadyExists,
    AdapterFailed,
    AdapterNotFound,
    AdapterRejected,
    AliasNotFound,
    BaseModelUnsupported,
    EngineStopped,
    InvalidRequest,
    TextTooLong,
)
from lora_runtime.runtime import Runtime, RuntimeSettings
from tests.oracle import make_adapter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_bert, folder / "news", num_labels=3)
    make_adapter(tiny_bert, folder / "spam", num_labels=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def runtime(root: Path, tiny_bert: Path) -> Iterator[Runtime]:
    with Runtime(tiny_bert) as runtime:
        runtime.load(root / "news")
        runtime.load(root / "spam", name="mail", version=3)
        yield runtime


def test_an_adapter_answers_with_its_own_labels(runtime: Runtime) -> None:
    news, mail = runtime.classify("news", ["one"])[0], runtime.classify("mail@3", ["one"])[0]
    assert list(news.scores) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert list(mail.scores) == ["LABEL_0", "LABEL_1"]
    assert news.scores[news.label] == news.score == max(news.scores.values())
    assert runtime.classify("news", []) == []


def test_many_threads_share_the_engine_and_get_their_own_answers(runtime: Runtime) -> None:
    texts = [f"text number {n} " * (1 + n % 3) for n in range(40)]
    alone = {text: (runtime.classify("news", [text])[0], runtime.classify("mail", [text])[0]) for text in texts}
    with ThreadPoolExecutor(8) as pool:
        news = pool.map(lambda text: runtime.classify("news", [text])[0], texts)
        mail = pool.map(lambda text: runtime.classify("mail", [text])[0], texts)
        for text, first, second in zip(texts, news, mail, strict=True):
            assert first.scores == pytest.approx(alone[text][0].scores, abs=1e-5)
            assert second.scores == pytest.approx(alone[text][1].scores, abs=1e-5)


def test_what_is_not_there_or_not_right_raises_its_own_error(runtime: Runtime, root: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        runtime.classify("nobody", ["one"])
    with pytest.raises(AdapterNotFound, match="news@2"):
        runtime.classify("news@2", ["one"])
    with pytest.raises(AliasNotFound, match="news@x"):
        runtime.classify("news@x", ["one"])
    with pytest.raises(InvalidRequest, match="positive integer"):
        runtime.classify("news@1x", ["one"])
    with pytest.raises(AdapterAlreadyExists):
        runtime.load(root / "news")
    with pytest.raises(AdapterRejected, match="not a folder"):
        runtime.load(tmp_path / "missing")


def test_a_text_beyond_the_base_is_refused_or_cut(runtime: Runtime) -> None:
    long = "word " * 100
    with pytest.raises(TextTooLong, match="has 102 tokens, the limit is 64") as caught:
        runtime.classify("news", ["short", long])
    assert caught.value.field == "inputs[1].text"
    assert runtime.classify("news", [long], truncate=True)


@pytest.mark.parametrize(("limit", "pair"), [(1, None), (2, "word " * 9)])
def test_a_text_that_cannot_be_cut_short_enough_is_refused(runtime: Runtime, limit: int, pair: str | None) -> None:
    """Tokenizers return it whole then: beyond the base's positions, it would fail the whole batch."""
    with pytest.raises(InvalidRequest, match="special tokens") as caught:
        runtime.encoder.encode([("word " * 100, pair)], max_length=limit, truncate=True)
    assert caught.value.field == "inputs[0].text"


def test_a_closed_runtime_refuses(root: Path, tiny_bert: Path) -> None:
    with Runtime(tiny_bert) as runtime:
        runtime.load(root / "news")
    with pytest.raises(EngineStopped):
        runtime.classify("news", ["one"])


def test_a_dtype_that_is_not_served_is_refused(tiny_bert: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="bfloat16"):
        Runtime(tiny_bert, RuntimeSettings(dtype="bfloat16"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_only_the_engine_has_a_team_of_compute_threads(encoder_path: Path, tmp_path: Path) -> None:
    """A second team would make every small operation of the engine several times slower."""
    make_adapter(encoder_path, tmp_path / "wide", rank=256, targets="all-linear", num_labels=3)
    program = f"""
        import os, warnings
        warnings.simplefilter("ignore")
        from lora_runtime.runtime import Runtime, RuntimeSettings

        def tasks():
            return len(os.listdir("/proc/self/task"))

        with Runtime({str(encoder_path)!r}, RuntimeSettings(num_threads=2)) as runtime:
            runtime.encoder.encode([("the tokenizer has threads of its own", None)], max_length=None, truncate=False)
            before = tasks()
            runtime.load({str(tmp_path / "wide")!r}, name="first")
            loaded = tasks()
            runtime.classify("first", ["some text " * 50])
            runtime.load({str(tmp_path / "wide")!r}, name="second")
            print(before, loaded, tasks())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 0, done.stderr
    before, loaded, computed = map(int, done.stdout.split())
    assert loaded == before + 1, "a load starts the loader's one thread and no others"
    assert computed == loaded + 1, "the forward pass starts the engine's one helper (2 threads) and no others"


def test_a_refused_folder_can_be_mended_and_loaded_again(runtime: Runtime, root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "news", tmp_path / "mended"))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])  # seen in the header: it is not registered at all
    with pytest.raises(AdapterRejected, match="copy it again"):
        runtime.load(folder)
    weights.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")  # a NaN is seen only when it is loaded
    with pytest.raises(AdapterFailed, match="mend it and load it again"):
        runtime.load(folder)
    weights.write_bytes(whole)
    assert runtime.load(folder).state == "READY"
    assert runtime.classify("mended", ["one"])


@pytest.mark.parametrize("texts", ["one string", [3], [None], [("a", "b", "c")]])
def test_what_is_no_text_is_refused_with_its_place(runtime: Runtime, texts: Any) -> None:
    with pytest.raises(InvalidRequest, match="texts"):
        runtime.classify("news", texts)


def test_the_name_in_a_message_can_be_used_in_a_request(runtime: Runtime) -> None:
    assert runtime.classify("default/mail@3", ["one"]) == runtime.classify("mail@3", ["one"])
