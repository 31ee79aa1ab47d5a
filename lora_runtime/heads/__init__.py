"""Task heads over the shared backbone."""

from lora_runtime.heads.outputs import output_of
from lora_runtime.heads.pooled import PooledHead
from lora_runtime.heads.task_head import TaskHead

__all__ = ["PooledHead", "TaskHead", "output_of"]
