"""Task heads over the shared backbone."""

from lora_runtime.heads.scores import scores_of
from lora_runtime.heads.task_head import TaskHead

__all__ = ["TaskHead", "scores_of"]
