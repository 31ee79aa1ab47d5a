"""`grouped_lora` in Triton: two kernels, a flat list of tiles, and the slot table mirrored on the device."""
