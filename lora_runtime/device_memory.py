"""What an accelerator's memory holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes, as torch's allocator of this process counts them."""

    allocated: int  # that tensors hold
    reserved: int  # these, and what is kept for the next ones
    capacity: int  # of the device
