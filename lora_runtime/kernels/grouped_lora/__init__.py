"""Each token's own low-rank delta, added to the base projection's output."""

from lora_runtime.kernels.grouped_lora.api import CompilingLora, GroupedLora, GroupLora, LoraPlan, Segment, grouped_lora

__all__ = ["CompilingLora", "GroupLora", "GroupedLora", "LoraPlan", "Segment", "grouped_lora"]
