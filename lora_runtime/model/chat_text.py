"""Conversations to text, by the chat template of a tokenizer; nobody's content can pass for a turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.model.encoder_text import TextEncoder, check_encodable
from lora_runtime.model.template_process import RenderFailed, TemplateProcess, check_rendered
from lora_runtime.model.template_renderer import describe
from lora_runtime.prompts.chat import ROLES, Chat

MAX_TEMPLATE_CHARS = 64 * 1024  # of an adapter's

Turns = list[dict[str, str]]


class ChatText:
    """Thread-safe.

    A template that is the one of the tokenizer `trusted`, the base's, runs here. Any other came with an adapter and
    runs in a `renderer`, which bounds its time and memory; at most 64 KiB of it are taken.
    """

    def __init__(self, encoder: TextEncoder, *, trusted: Any, renderer: TemplateProcess) -> None:
        self._encoder = encoder
        self._tokenizer = encoder.tokenizer
        self._renderer = renderer
        self.template = default_template(self._tokenizer)
        self._is_trusted = self.template == default_template(trusted)

    def render(self, chats: Mapping[str, Chat]) -> dict[str, str]:
        """The text of each conversation with the header of the assistant's next turn, by the field it came in.

        Raises InvalidRequest on that field: without a template, on a role or a content that cannot be taken, and when
        the template fails.
        """
        conversations = [self._turns(field, chat) for field, chat in chats.items()]
        fields = list(chats)
        try:
            texts = self._texts(fields[0], conversations)
        except RenderFailed as error:
            problem = f"the chat template of the tokenizer cannot render it: {error.reason}"
            raise InvalidRequest(fields[error.index], f"{problem}; mend the conversation or the template") from None
        return dict(zip(fields, texts, strict=True))

    def _texts(self, field: str, conversations: Sequence[Turns]) -> list[str]:
        if self.template is None:
            raise InvalidRequest(field, "the tokenizer has no chat template; send a text, or fields of a prompt")
        if self._is_trusted:
            return [self._rendered_here(self.template, i, turns) for i, turns in enumerate(conversations)]
        if len(self.template) > MAX_TEMPLATE_CHARS:
            problem = f"the adapter's chat template has {len(self.template)} characters"
            raise InvalidRequest(field, f"{problem}, the limit is {MAX_TEMPLATE_CHARS}; send a text instead")
        tokens = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        return self._renderer.render(self.template, conversations, tokens)

    def _rendered_here(self, template: str, index: int, turns: Turns) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template may raise anything
            raise RenderFailed(index, describe(error, template)) from error
        return check_rendered(text, index)

    def _turns(self, field: str, chat: Chat) -> Turns:
        if not chat.messages:
            raise InvalidRequest(field, "has no message; send the user's at least")
        for number, message in enumerate(chat.messages):
            if message.role not in ROLES:
                known = ", ".join(ROLES)
                raise InvalidRequest(field, f"message {number} has the role {message.role[:40]!r}; {known} are known")
            check_encodable(field, message.content)
            self._check_forges_nothing(field, number, message.content)
        return [{"role": message.role, "content": message.content} for message in chat.messages]

    def _check_forges_nothing(self, field: str, number: int, content: str) -> None:
        """Refuse a content that has, as written or as the tokenizer reads it, a token that can mark a turn."""
        pattern, ids = self._control
        if found := pattern.search(content):
            token = found.group()
        else:
            read = self._encoder.encode_text(field, content, add_special_tokens=False).input_ids
            token = next((self._tokenizer.convert_ids_to_tokens(i) for i in read if i in ids), None)
        if token is not None:
            problem = f"message {number} has the special token {token!r}, which could forge a turn; leave it out"
            raise InvalidRequest(field, problem, token=token)

    @cached_property
    def _control(self) -> tuple[re.Pattern[str], frozenset[int]]:
        """Special tokens, and added ones that the template writes: as a pattern, and their ids.

        The unknown token is found as text alone, since characters that the vocabulary lacks become it.
        """
        added = self._tokenizer.added_tokens_decoder
        template = self.template or ""
        names = {token.content for token in added.values() if token.special or token.content in template}
        names.update(self._tokenizer.all_special_tokens)
        names.discard("")
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        ids = frozenset(self._tokenizer.convert_tokens_to_ids(longest_first)) - {self._tokenizer.unk_token_id}
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), ids


def default_template(tokenizer: Any) -> str | None:
    """The chat template for conversations without tools, None without one."""
    found = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found
