"""What a decoder under training writes on its own: greedy, several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from lora_runtime.model.text_generation import TextGeneration

AT_ONCE = 16


def continue_prompts(
    model: nn.Module, text: TextGeneration, pad_token_id: int, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """The greedy continuation of each prompt up to an end token; the model's mode is left as it was."""
    training = model.training
    model.eval()
    try:
        return [
            continuation
            for start in range(0, len(prompts), AT_ONCE)
            for continuation in _continue(model, text, pad_token_id, prompts[start : start + AT_ONCE], max_new_tokens)
        ]
    finally:
        model.train(training)


def _continue(
    model: nn.Module, text: TextGeneration, pad_token_id: int, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    rows = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ends = sorted(text.eos_token_ids)
    with torch.inference_mode():
        generated = cast(Any, model).generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            do_sample=False,
            use_cache=True,
            max_new_tokens=max(1, min(max_new_tokens, text.max_length - longest)),
            eos_token_id=ends,
            pad_token_id=pad_token_id,
        )
    return [_text_of(tokens, text) for tokens in generated[:, longest:].tolist()]


def _text_of(tokens: Sequence[int], text: TextGeneration) -> str:
    stream = text.new_text()
    pieces: list[str] = []
    for token in tokens:
        if token in text.eos_token_ids:
            break
        pieces.append(stream.append(token))
    return "".join([*pieces, stream.flush()])
