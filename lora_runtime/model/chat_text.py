"""Conversations to text, by the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.model.encoder_text import TextEncoder
from lora_runtime.prompts.chat import Chat


class ChatText:
    """Thread-safe."""

    def __init__(self, encoder: TextEncoder, *, trusted: Any) -> None:
        self._tokenizer = encoder.tokenizer
        self._trusted = trusted
        self.template: str | None = self._tokenizer.chat_template

    def render(self, chats: Mapping[str, Chat]) -> dict[str, str]:
        """The text of each conversation, by the field it came in; raises InvalidRequest on that field."""
        rendered: dict[str, str] = {}
        for field, chat in chats.items():
            if self.template is None:
                raise InvalidRequest(field, "the tokenizer has no chat template; send a text instead")
            messages = [{"role": message.role, "content": message.content} for message in chat.messages]
            rendered[field] = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return rendered
