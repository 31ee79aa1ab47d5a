"""From which token on an adapter changes a sequence. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.types import AdapterCard


def first_active(card: AdapterCard, input_ids: Sequence[int]) -> int | None:
    """The first token that the adapter changes: 0; of an aLoRA the start of its last invocation sequence.

    None when an aLoRA is not invoked: it leaves the whole sequence, and what follows it, to the base.
    """
    invocation = card.invocation_tokens
    if invocation is None:
        return 0
    width = len(invocation)
    starts = (at for at in range(len(input_ids) - width, -1, -1) if tuple(input_ids[at : at + width]) == invocation)
    return next(starts, None)
