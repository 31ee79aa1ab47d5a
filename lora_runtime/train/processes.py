"""One process of a run: alone, or one of those that torchrun or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.settings import DeviceChoice


@dataclass(frozen=True, slots=True)
class Process:
    """Which one this is. Only the first prints and writes."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def this_process(environment: Mapping[str, str] | None = None) -> Process:
    """From the variables that the launchers set."""
    found = os.environ if environment is None else environment
    count = int(found.get("WORLD_SIZE", "1"))
    if count == 1:
        return Process()
    return Process(int(found.get("RANK", "0")), count, int(found.get("LOCAL_RANK", "0")))


def wait_for_all(process: Process) -> None:
    """Until every process of the run is here."""
    if process.count > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_processes(process: Process) -> None:
    """The end of what the processes of a run have in common; no other run can begin here."""
    if process.count > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def device_of(choice: DeviceChoice, process: Process) -> torch.device:
    """Where this process computes; raises InvalidRequest on `device` when CUDA was asked for and is absent."""
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice is DeviceChoice.CPU or (choice is DeviceChoice.AUTO and not num_devices):
        return torch.device("cpu")
    if not num_devices:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise InvalidRequest("device", f"cuda was asked for, and {built}; choose cpu or auto")
    if process.local_rank >= num_devices:
        message = f"process {process.local_rank} of this machine has no device: there are {num_devices}"
        raise InvalidRequest("device", f"{message}; start no more processes than devices")
    return torch.device("cuda", process.local_rank)
