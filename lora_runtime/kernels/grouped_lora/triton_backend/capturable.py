"""What a captured forward pass needs of a backend. Imports no Triton, so that a runtime without it can ask."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from lora_runtime.kernels.grouped_lora.api import GroupedLora, LoraPlan
from lora_runtime.kernels.grouped_lora.triton_backend.slots import DeviceSlots
from lora_runtime.kernels.grouped_lora.triton_backend.tiles import TileList


@runtime_checkable
class CapturableLora(GroupedLora, Protocol):
    """A backend that reads its slots and tiles on the device, see TritonGroupedLora."""

    device_slots: DeviceSlots

    def prepare(self, plan: LoraPlan) -> TileList:
        """Make all copies that the plan needs, before it is captured."""
        ...

    def tile_rows_for(self, num_rows: int) -> int:
        """The rows of a tile for batches of so many rows."""
        ...
