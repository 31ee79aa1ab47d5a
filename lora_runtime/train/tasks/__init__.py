"""The tasks that adapters are trained for.

options.py     what each is told beside its files; no torch
api.py         `TrainTask`: what a run needs of one
classify.py  tokens.py  answer.py  prompts.py (sampling.py)  embed.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_runtime.train.tasks.options import (
    AnswerOptions,
    ClassifyOptions,
    EmbedOptions,
    PromptOptions,
    TokensOptions,
)

if TYPE_CHECKING:  # brings torch and peft
    from lora_runtime.train.settings import TrainSettings
    from lora_runtime.train.tasks.api import TrainTask


def make_task(settings: TrainSettings) -> TrainTask:
    """Check the options and the loss, and read the rows; raises InvalidRequest and TrainingDataInvalid."""
    data, seed, loss = settings.data, settings.run.seed, settings.optim.loss
    match settings.task:
        case ClassifyOptions() as options:
            from lora_runtime.train.tasks.classify import ClassifyTask

            return ClassifyTask(options, data, seed, loss)
        case TokensOptions() as options:
            from lora_runtime.train.tasks.tokens import TokensTask

            return TokensTask(options, data, seed, loss)
        case AnswerOptions() as options:
            from lora_runtime.train.tasks.answer import AnswerTask

            return AnswerTask(options, data, seed, loss)
        case PromptOptions() as options:
            from lora_runtime.train.tasks.prompts import PromptsTask

            return PromptsTask(options, data, seed, loss)
        case EmbedOptions() as options:
            from lora_runtime.train.tasks.embed import EmbedTask

            return EmbedTask(options, data, seed, loss)
