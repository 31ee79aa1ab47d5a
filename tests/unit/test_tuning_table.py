"""Block sizes come from the device's table, by bucket, and a table that is not one is refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_runtime.errors import BaseModelUnsupported
from lora_runtime.kernels.grouped_lora.triton_backend.tuning import (
    RANK_BUCKETS,
    TOKEN_BUCKETS,
    TableFile,
    TuningTable,
    bucket_of,
    choose_table,
    load_table,
    packaged_tables,
    read_table,
)

SHRINK = {"block_rank": 16, "block_in": 32, "split": 4, "num_warps": 2, "num_stages": 3}
EXPAND = {"block_rank": 32, "block_out": 64, "num_warps": 8, "num_stages": 1}


def contents(**changed: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "device": "Some GPU",
        "capability": "9.0",
        "dtype": "bfloat16",
        "versions": {"triton": "3.6.0"},
        "tile_rows": {"16": 16, "1024": 64},
        "shrink": [{"d_in": 768, "rank": 64, "tokens": 256, **SHRINK}],
        "expand": [{"d_out": 3072, "rank": 64, "tokens": 256, **EXPAND}],
    } | changed


def written(tmp_path: Path, **changed: Any) -> Path:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(contents(**changed)), encoding="utf-8")
    return path


def test_what_was_measured_is_found_by_bucket(tmp_path: Path) -> None:
    table = load_table(torch.device("cpu"), torch.bfloat16, written(tmp_path))
    for rank, tokens in ((17, 65), (64, 256)):
        found = table.shrink_for(768, rank, tokens).model_dump()
        assert {key: found[key] for key in SHRINK} == SHRINK
        found = table.expand_for(3072, rank, tokens).model_dump()
        assert {key: found[key] for key in EXPAND} == EXPAND
    assert [table.tile_rows_for(tokens) for tokens in (1, 16, 17, 257, 1024)] == [16, 16, 16, 64, 64]


@pytest.mark.parametrize(("width", "rank", "tokens"), [(769, 64, 256), (768, 65, 256), (768, 64, 257), (768, 16, 256)])
def test_what_was_not_measured_is_the_default(tmp_path: Path, width: int, rank: int, tokens: int) -> None:
    table, empty = load_table(torch.device("cpu"), torch.bfloat16, written(tmp_path)), TuningTable()
    assert table.shrink_for(width, rank, tokens) == empty.shrink_for(width, rank, tokens)
    assert table.expand_for(width, rank, tokens) == empty.expand_for(width, rank, tokens)


def test_anything_above_the_last_bucket_is_in_it() -> None:
    assert bucket_of(100_000, TOKEN_BUCKETS) == TOKEN_BUCKETS[-1]
    table = TuningTable()
    assert table.shrink_for(768, 4096, 1 << 20) == table.shrink_for(768, RANK_BUCKETS[-1], TOKEN_BUCKETS[-1])


@pytest.mark.parametrize("d_in", [1, 16, 36, 384, 4096, 14336])
def test_defaults_are_valid_for_every_shape(d_in: int) -> None:
    """Blocks are powers of two from 16 up: the configurations' own validation checks them."""
    table = TuningTable()
    for rank in RANK_BUCKETS:
        for tokens in TOKEN_BUCKETS:
            shrink, expand = table.shrink_for(d_in, rank, tokens), table.expand_for(d_in, rank, tokens)
            assert shrink.block_rank <= rank
            assert (shrink.block_in + shrink.block_rank) * 64 * 4 * shrink.num_stages <= 96 << 10
            assert (expand.block_out + 64) * expand.block_rank * 4 * expand.num_stages <= 96 << 10


def test_a_device_prefers_its_own_table_then_one_of_its_capability() -> None:
    def of(device: str, capability: str, dtype: str, tile_rows: int) -> TableFile:
        values = contents(device=device, capability=capability, dtype=dtype, tile_rows={"16": tile_rows})
        return TableFile.model_validate(values)

    files = [of("B", "9.0", "float16", 32), of("A", "9.0", "float16", 64), of("A", "9.0", "float32", 128)]
    assert choose_table(files, "A", "9.0", "float16").tile_rows_for(1) == 64
    assert choose_table(files, "C", "9.0", "float16").tile_rows_for(1) == 32
    assert choose_table(files, "A", "9.0", "float32").tile_rows_for(1) == 128
    for device, capability, dtype in (("C", "8.0", "float16"), ("A", "9.0", "bfloat16")):
        assert choose_table(files, device, capability, dtype) == TuningTable()


BROKEN = {
    "a block that is no power of two": ({"shrink": [{"d_in": 8, "rank": 16, "tokens": 16, **SHRINK, "block_in": 48}]},
                                        "shrink.0.block_in", "not a power of two"),
    "a block below 16": ({"expand": [{"d_out": 8, "rank": 16, "tokens": 16, **EXPAND, "block_rank": 8}]},
                         "expand.0.block_rank", "greater than or equal to 16"),
    "a rank that is no bucket": ({"shrink": [{"d_in": 8, "rank": 17, "tokens": 16, **SHRINK}]},
                                 "shrink.0.rank", "not one of 16, 64, 256"),
    "tokens that are no bucket": ({"tile_rows": {"17": 16}}, "tile_rows", "not one of 16, 64"),
    "tile rows of a word": ({"tile_rows": {"many": 16}}, "tile_rows", "many"),
    "a text for a number": ({"shrink": [{"d_in": "8", "rank": 16, "tokens": 16, **SHRINK}]},
                            "shrink.0.d_in", "integer"),
    "a field too many": ({"fastest": True}, "fastest", "not permitted"),
    "another format": ({"format": 2}, "format", "1"),
    "an unknown dtype": ({"dtype": "int8"}, "dtype", "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_table_is_refused_with_its_place_and_the_remedy(tmp_path: Path, name: str) -> None:
    changed, place, reason = BROKEN[name]
    path = written(tmp_path, **changed)
    with pytest.raises(BaseModelUnsupported) as caught:
        read_table(path)
    for part in (str(path), place, reason, "multilora tune"):
        assert part in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(data)
    with pytest.raises(BaseModelUnsupported, match=r"table\.json"):
        read_table(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="cannot be read"):
        load_table(torch.device("cpu"), torch.bfloat16, tmp_path / "absent.json")


def test_a_table_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelUnsupported, match="measured in bfloat16, float16 is served"):
        load_table(torch.device("cpu"), torch.float16, written(tmp_path))


def test_the_tables_in_the_package_are_valid() -> None:
    names = [(file.device, file.dtype) for file in map(read_table, packaged_tables())]
    assert len(names) == len(set(names)), "two tables for one device and dtype"
