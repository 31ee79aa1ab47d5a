"""Whatever config and header a folder holds, it is served or refused with a typed reason, at load and at inspection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.adapters.base_spec import BaseSpec
from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.config import LoraConfig
from lora_runtime.adapters.inspect import inspect_adapter
from lora_runtime.errors import AdapterRejected
from tests.unit.base_specs import spec_of
from tests.unit.peft_folders import CONFIG, NO_LIMIT, WEIGHTS, save

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from([*LoraConfig.model_fields, "task_type", "modules_to_save", "bias"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 80), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 5000), max_size=3) | JSON,
    },
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("bert", "SEQ_CLS", tmp_path_factory.mktemp("pristine") / "adapter", bias="all")


@pytest.fixture(scope="module")
def folder(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples: each writes the file that it changes anew."""
    return Path(shutil.copytree(pristine, tmp_path_factory.mktemp("fuzzed") / "adapter"))


@pytest.fixture(scope="module")
def base() -> BaseSpec:
    return spec_of("bert")


def outcome(folder: Path, base: BaseSpec) -> str | None:
    """The code of the refusal, None when it is served; what is inspected must come to the same verdict."""
    report = inspect_adapter(folder, base)
    inspect_adapter(folder, None)
    refusal: AdapterRejected | None = None
    try:
        read_checkpoint(folder, base, NO_LIMIT)
    except AdapterRejected as error:
        refusal = error
    assert report.loadable == (refusal is None), (report.problems, refusal)
    assert refusal is None or refusal.message.isprintable()
    return refusal and refusal.code


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(FIELDS, JSON, max_size=3))
def test_no_config_is_an_error_of_ours(pristine: Path, folder: Path, base: BaseSpec, changes: dict[str, Any]) -> None:
    shutil.copy(pristine / WEIGHTS, folder / WEIGHTS)
    config = json.loads((pristine / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    outcome(folder, base)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_file_in_the_place_of_a_config_is_an_error_of_ours(
    pristine: Path, folder: Path, base: BaseSpec, content: bytes
) -> None:
    shutil.copy(pristine / WEIGHTS, folder / WEIGHTS)
    (folder / CONFIG).write_bytes(content)
    assert outcome(folder, base) is not None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_header_is_an_error_of_ours(pristine: Path, folder: Path, base: BaseSpec, data: st.DataObject) -> None:
    shutil.copy(pristine / CONFIG, folder / CONFIG)
    whole = (pristine / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for key in data.draw(st.lists(st.sampled_from(sorted(header)) | st.text(max_size=20), max_size=3)):
        header[key] = (header.get(key) or {}) | data.draw(ENTRIES)
    changed = data.draw(st.just(json.dumps(header).encode()) | st.binary(max_size=60))
    claimed = data.draw(st.just(len(changed)) | st.integers(0, 2**64 - 1))
    (folder / WEIGHTS).write_bytes(claimed.to_bytes(8, "little") + changed + whole[8 + length :])
    outcome(folder, base)
