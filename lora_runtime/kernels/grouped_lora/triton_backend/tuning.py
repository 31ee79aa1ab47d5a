"""Block sizes by device, shape, rank and number of tokens: looked up, never searched for while serving.

Rank and tokens fall into a few buckets, so the kernels that a base can ever need are known before it serves, and
are compiled then. What a table lacks has a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lora_runtime.errors import BaseModelUnsupported

RANK_BUCKETS = (16, 64, 256)  # of a group's ranks together; larger ones are in the last
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096)
_PACKAGE = "lora_runtime.kernels.grouped_lora.tuning"
_MAX_SPLIT = 8


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


def _rank_bucket(value: int) -> int:
    if value not in RANK_BUCKETS:
        raise ValueError(f"{value} is not one of {', '.join(map(str, RANK_BUCKETS))}")
    return value


def _token_bucket(value: int) -> int:
    if value not in TOKEN_BUCKETS:
        raise ValueError(f"{value} is not one of {', '.join(map(str, TOKEN_BUCKETS))}")
    return value


Block = Annotated[int, Field(ge=16, le=512), AfterValidator(_power_of_two)]
Warps = Annotated[int, Field(ge=1, le=16), AfterValidator(_power_of_two)]
Stages = Annotated[int, Field(ge=1, le=8)]
RankBucket = Annotated[int, AfterValidator(_rank_bucket)]
TokenBucket = Annotated[int, AfterValidator(_token_bucket)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShrinkConfig(_Strict):
    """One launch of the shrink kernel."""

    block_rank: Block
    block_in: Block
    split: Annotated[int, Field(ge=1, le=64)]  # parts of d_in, each summed into a plane of its own
    num_warps: Warps
    num_stages: Stages


class ExpandConfig(_Strict):
    """One launch of the expand kernel."""

    block_rank: Block
    block_out: Block
    num_warps: Warps
    num_stages: Stages


class ShrinkEntry(ShrinkConfig):
    """A shrink that was measured: the fastest for `d_in` and two buckets."""

    d_in: Annotated[int, Field(ge=1)]
    rank: RankBucket
    tokens: TokenBucket


class ExpandEntry(ExpandConfig):
    """An expand that was measured: the fastest for `d_out` and two buckets."""

    d_out: Annotated[int, Field(ge=1)]
    rank: RankBucket
    tokens: TokenBucket


class TableFile(_Strict):
    """A table as it is written: what `multilora tune` found on one device."""

    format: Literal[1] = 1
    device: str  # as CUDA names it
    capability: str  # such as 9.0; devices of the same one use the table when they have none of their own
    dtype: Literal["float32", "float16", "bfloat16"]  # of the activations and the adapters
    versions: dict[str, str]  # of what it was measured with
    tile_rows: dict[str, Block]  # by token bucket; JSON has no integer keys
    shrink: list[ShrinkEntry]
    expand: list[ExpandEntry]


@dataclass(frozen=True, slots=True)
class TuningTable:
    """Configurations by (d_in or d_out, rank bucket, token bucket), tile rows by token bucket."""

    tile_rows: Mapping[int, int] = field(default_factory=dict[int, int])
    shrink: Mapping[tuple[int, int, int], ShrinkConfig] = field(
        default_factory=dict[tuple[int, int, int], ShrinkConfig]
    )
    expand: Mapping[tuple[int, int, int], ExpandConfig] = field(
        default_factory=dict[tuple[int, int, int], ExpandConfig]
    )

    @classmethod
    def of(cls, file: TableFile) -> TuningTable:
        return cls(
            {int(bucket): rows for bucket, rows in file.tile_rows.items()},
            {(entry.d_in, entry.rank, entry.tokens): entry for entry in file.shrink},
            {(entry.d_out, entry.rank, entry.tokens): entry for entry in file.expand},
        )

    def tile_rows_for(self, num_tokens: int) -> int:
        """Rows of a tile in a batch of `num_tokens` tokens; the same for all shapes, since they share the tiles."""
        tokens = bucket_of(num_tokens, TOKEN_BUCKETS)
        return self.tile_rows.get(tokens) or default_tile_rows(tokens)

    def shrink_for(self, d_in: int, rank: int, num_tokens: int) -> ShrinkConfig:
        """`rank`: the largest of a group's ranks together in the batch."""
        rank, tokens = bucket_of(rank, RANK_BUCKETS), bucket_of(num_tokens, TOKEN_BUCKETS)
        return self.shrink.get((d_in, rank, tokens)) or default_shrink(d_in, rank, tokens)

    def expand_for(self, d_out: int, rank: int, num_tokens: int) -> ExpandConfig:
        """`rank`: the largest of a group's ranks together in the batch."""
        rank, tokens = bucket_of(rank, RANK_BUCKETS), bucket_of(num_tokens, TOKEN_BUCKETS)
        return self.expand.get((d_out, rank, tokens)) or default_expand(d_out, rank)


def default_tile_rows(tokens: int) -> int:
    """Few rows where segments are short; more where each reading of A and B is to serve more of them."""
    return 16 if tokens <= 256 else 32 if tokens <= 1024 else 64


def default_shrink(d_in: int, rank: int, tokens: int) -> ShrinkConfig:
    """d_in is split where few tokens make few tiles, so that a whole device has something to do."""
    split = min(_MAX_SPLIT, max(1, d_in // 512)) if tokens <= 256 else 1
    return ShrinkConfig(
        block_rank=min(rank, 64), block_in=min(64, _ceil_power_of_two(d_in)), split=split, num_warps=4, num_stages=2
    )


def default_expand(d_out: int, rank: int) -> ExpandConfig:
    """Blocks that fit into the shared memory of small devices too, in fp32."""
    return ExpandConfig(
        block_rank=min(rank, 32), block_out=min(128, _ceil_power_of_two(d_out)), num_warps=4, num_stages=2
    )


def bucket_of(value: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `value`; the last one for anything larger."""
    return next((bucket for bucket in buckets if value <= bucket), buckets[-1])


def load_table(device: torch.device, dtype: torch.dtype, path: Path | None = None) -> TuningTable:
    """The table in `path`, or of the packaged ones the device's own, or one of its compute capability, or none.

    Raises BaseModelUnsupported for a file that cannot be read, or that is of another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if path is not None:
        file = read_table(path)
        if file.dtype != name:
            raise BaseModelUnsupported(
                f"tuning table {path} was measured in {file.dtype}, {name} is served; make one with --dtype {name}",
                path=path,
                dtype=name,
            )
        return TuningTable.of(file)
    if device.type != "cuda":
        return TuningTable()
    model = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    return choose_table([read_table(p) for p in packaged_tables()], model, f"{major}.{minor}", name)


def choose_table(files: list[TableFile], device: str, capability: str, dtype: str) -> TuningTable:
    """The device's own table, or one of its compute capability, or an empty one: then all is default."""
    fitting = [file for file in files if file.dtype == dtype and capability == file.capability]
    fitting.sort(key=lambda file: file.device != device)
    return TuningTable.of(fitting[0]) if fitting else TuningTable()


def packaged_tables() -> list[Traversable]:
    """The table files that are part of this package, by name."""
    folder = resources.files(_PACKAGE)
    return sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)


def read_table(path: Path | Traversable) -> TableFile:
    """Read and check one file; raises BaseModelUnsupported with the file, the field and the remedy."""
    remedy = "make it again with multilora tune, or leave it out"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BaseModelUnsupported(f"tuning table {path} cannot be read ({error}); {remedy}", path=path) from error
    try:
        file = TableFile.model_validate_json(text)
        for bucket in file.tile_rows:
            _token_bucket(int(bucket))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        message = f"tuning table {path}: {where}: {first['msg']}; {remedy}"
        raise BaseModelUnsupported(message, path=path) from error
    except ValueError as error:
        raise BaseModelUnsupported(f"tuning table {path}: tile_rows: {error}; {remedy}", path=path) from error
    return file


def _ceil_power_of_two(value: int) -> int:
    return max(16, 1 << (value - 1).bit_length())
