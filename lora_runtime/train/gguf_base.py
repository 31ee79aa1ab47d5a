"""A base in a GGUF file under the head of a task: its dequantised weights, as serving reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora_runtime.model.checkpoint import Source, read_checkpoint

if TYPE_CHECKING:
    from lora_runtime.train.tasks.api import TaskShape


def load_gguf_base(source: Source, shape: TaskShape) -> tuple[PreTrainedModel, set[str], Tokenizer]:
    """The model in fp32, the parameters that the file lacks, and its tokenizer; raises BaseModelUnsupported.

    transformers reads such a file as a decoder with its output layer alone, whose backbone another class takes over.
    """
    checkpoint = read_checkpoint(source)
    decoder = cast(PreTrainedModel, checkpoint.model)
    if shape.needs_decoder:
        return decoder, set(checkpoint.missing), checkpoint.tokenizer
    config = decoder.config
    for name, value in shape.options.items():
        setattr(config, name, value)
    model = cast(PreTrainedModel, shape.auto_class.from_config(config))
    model.float()
    model.base_model.load_state_dict(decoder.base_model.state_dict())
    backbone = f"{model.base_model_prefix}."
    fresh = {} if model.base_model is model else model.state_dict()
    return model, {name for name in fresh if not name.startswith(backbone)}, checkpoint.tokenizer
