"""The recipes of `run.py` as acceptance tests: minutes each, with the data folder that MULTILORA_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.recipes.bases import BASES, BaseMissing
from tests.recipes.commands import LIMIT_CPU_S
from tests.recipes.run import missed, run_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def data() -> Path:
    folder = os.environ.get("MULTILORA_DATA")
    if not folder:
        pytest.skip("needs MULTILORA_DATA: a folder with ag_news, squad1, bioasq_factoid and tatoeba_en_zh")
    return Path(folder).resolve()


@pytest.mark.parametrize("base", BASES)
def test_a_file_becomes_a_served_adapter_that_does_its_task(
    base: str, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Trained, uploaded, measured on the test split, and PEFT's own in a mixed batch (`run_base` raises otherwise)."""
    try:
        BASES[base](tmp_path_factory.mktemp("bases"))
    except BaseMissing as missing:
        pytest.skip(str(missing))
    found = run_base(base, data, tmp_path_factory.mktemp("work"))
    assert {name: missed(case) for name, case in found.items()} == {name: [] for name in found}
    for case in found.values():
        assert sum(step["cpu_seconds"] for step in case["steps"]) < LIMIT_CPU_S
        assert case["served"]["others"] >= 2
        assert case["served"]["adapters_in_a_batch"] >= 2
