"""A conversation, as a chat template takes it."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `role` is one of ROLES; it is checked where the conversation is encoded."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """The turns so far, oldest first; what is generated is the assistant's next one."""

    messages: tuple[ChatMessage, ...]
