"""Why generation of a sequence ended. No torch here."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from lora_runtime.sampling.params import SamplingParams


class FinishReason(StrEnum):
    """The first three are what OpenAI's API calls "stop"; LENGTH is "length"."""

    EOS = "eos"  # the model drew an end-of-sequence token
    STOP_TOKEN = "stop_token"  # a token of `stop_token_ids`
    STOP_STRING = "stop_string"  # a text of `stop`
    LENGTH = "length"  # max_new_tokens, or the model's context is full
    CANCELLED = "cancelled"  # the caller went away
    DEADLINE = "deadline"  # the caller's deadline passed
    ERROR = "error"  # no token could be drawn: logits that are not finite, or a constraint that allows none

    @property
    def is_complete(self) -> bool:
        """Whether the text ended by itself; else it was cut."""
        return self in _COMPLETE


_COMPLETE = frozenset({FinishReason.EOS, FinishReason.STOP_TOKEN, FinishReason.STOP_STRING})


def finish_after(
    params: SamplingParams, token_id: int, num_new_tokens: int, eos_token_ids: Collection[int]
) -> FinishReason | None:
    """Whether a sequence ends with `token_id`, its `num_new_tokens`-th generated token; None when it goes on.

    Stop strings are `StopChecker`'s to find. EOS and stop tokens are not part of the text.
    """
    if token_id in params.stop_token_ids:
        return FinishReason.STOP_TOKEN
    if token_id in eos_token_ids and not params.ignore_eos:
        return FinishReason.EOS
    return FinishReason.LENGTH if num_new_tokens >= params.max_new_tokens else None
