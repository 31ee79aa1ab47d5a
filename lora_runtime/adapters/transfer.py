"""Copying an image from host memory to the device, beside what the device computes."""

from __future__ import annotations

import numpy as np
import torch

PIECE_ELEMENTS = 1 << 20  # 4 MiB in fp32: some 0.1 ms of a PCIe link, the most that a step of the engine waits


def copy_image(image: torch.Tensor, run: torch.Tensor) -> None:
    """Copy `image` [n] on the host into `run` [n or more] and wait until it is there.

    To an accelerator on a stream of its own, in pieces, so that decoding steps are not stalled behind a large image.
    """
    assert image.dtype is run.dtype, f"an image in {image.dtype} is not one in {run.dtype}"
    if run.device.type == "cpu":  # without an operation of torch, see checkpoint.py
        bits = torch.int16 if run.itemsize == 2 else run.dtype  # numpy knows no bfloat16
        np.copyto(run.view(bits).numpy()[: image.numel()], image.view(bits).numpy())
        return
    stream = torch.cuda.Stream(run.device)
    with torch.cuda.stream(stream):
        for start in range(0, image.numel(), PIECE_ELEMENTS):
            end = min(start + PIECE_ELEMENTS, image.numel())
            run[start:end].copy_(image[start:end], non_blocking=True)
            stream.synchronize()  # the next piece is not queued before the device has had its turn
