"""Stop strings are found wherever the text is split."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from lora_runtime.sampling.stops import StopChecker


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Grow the text by a character at a time until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def fed(deltas: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    checker, sent = StopChecker(stops, include_stop=include), ""
    for delta in deltas:
        check = checker.feed(delta)
        sent += check.text
        if check.stop is not None:
            return sent, check.stop
    return sent + checker.flush(), None


LETTERS = st.text("ab\n", min_size=1, max_size=5)


@given(st.lists(st.text("ab\n", max_size=4), max_size=12), st.lists(LETTERS, max_size=4), st.booleans())
@example(["abcd"], ["abcd", "bc"], False)
@example(["a", "aab"], ["aab"], False)
@example(["xab", "a"], ["ab", "xab"], True)
def test_any_split_gives_what_a_search_of_the_whole_text_gives(
    deltas: list[str], stops: list[str], include: bool
) -> None:
    assert fed(deltas, stops, include) == naive("".join(deltas), stops, include)


@given(st.lists(st.text("ab\n", max_size=4), max_size=12), st.lists(LETTERS, max_size=4))
def test_no_more_is_held_than_may_become_a_stop_string(deltas: list[str], stops: list[str]) -> None:
    checker, sent, whole = StopChecker(stops), "", ""
    for delta in deltas:
        check = checker.feed(delta)
        sent, whole = sent + check.text, whole + delta
        if check.stop is not None:
            return
        assert whole.startswith(sent)
        held = whole[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_text_without_stop_strings_is_never_held() -> None:
    assert StopChecker(()).feed("any") == ("any", None)


def test_a_stop_string_can_stay() -> None:
    assert StopChecker(("\n\n",), include_stop=True).feed("a\n\nb") == ("a\n\n", "\n\n")
