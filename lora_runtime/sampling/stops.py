"""Stop strings in a text that arrives in pieces. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopCheck(NamedTuple):
    """What one piece of text led to."""

    text: str  # safe to send: no later piece can make it part of a stop string
    stop: str | None  # the stop string found; the checker then takes no more text


class StopChecker:
    """Finds the stop string that is complete first, wherever token borders fall.

    The text is cut where that string starts, or where it ends if `include_stop`. Of several that end at the same
    character the longest counts. The result depends on the whole text alone, not on how it was split: a text is held
    back while it could still become a stop string, so at most the longest one's length less one.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._include_stop = include_stop
        self._held = ""
        self._stopped = False

    def feed(self, delta: str) -> StopCheck:
        """Take the next piece of text, of any length."""
        assert not self._stopped, "text after a stop string"
        text = self._held + delta
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            self._held, self._stopped = "", True
            return StopCheck(text[: end if self._include_stop else start], stop)
        border = self._held_from(text)
        self._held = text[border:]
        return StopCheck(text[:border], None)

    def flush(self) -> str:
        """The text held back, when generation ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_from(self, text: str) -> int:
        """Where the longest suffix of `text` starts that begins a stop string; its length if none does."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts and any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
