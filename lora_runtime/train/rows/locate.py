"""Where an answer stands in its context: checked against the place that is given, or found."""

from __future__ import annotations

MAX_PLACES = 5  # named in a message


def locate(context: str, text: str, start: int | None) -> int:
    """The character, from 0, at which `text` begins in `context`; raises ValueError with a remedy.

    Without `start` the text must occur exactly once. With it, the text must be there.
    """
    if start is not None and start >= 0 and context.startswith(text, start):
        return start
    places = _occurrences(context, text)
    if start is None and len(places) == 1:
        return places[0]
    if not places:
        raise ValueError("an answer does not occur in its context; take its text from the context, letter by letter")
    listed = ", ".join(map(str, places[:MAX_PLACES])) + (", …" if len(places) > MAX_PLACES else "")
    if start is None:
        raise ValueError(f"an answer occurs more than once, at characters {listed}; say which by its answer_start")
    hint = "; the given one counts bytes" if _at_byte(context, text, start) else ""
    remedy = f"correct answer_start (characters from 0{hint})"
    raise ValueError(f"an answer is not at character {start} of its context but at {listed}; {remedy}")


def _occurrences(context: str, text: str) -> list[int]:
    found: list[int] = []
    at = context.find(text)
    while at >= 0 and len(found) <= MAX_PLACES:
        found.append(at)
        at = context.find(text, at + 1)
    return found


def _at_byte(context: str, text: str, start: int) -> bool:
    return start >= 0 and context.encode().startswith(text.encode(), start)
