"""What may be searched, as it is written on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.search.space import Choice, Range, applied, default_space, parse_space
from lora_runtime.train.settings import DataFiles, Init, RunSettings, Schedule, TrainSettings
from lora_runtime.train.tasks.options import ClassifyOptions
from server.train_cli.searching import SearchOptions, search_options

SETTINGS = TrainSettings("base", ClassifyOptions(), DataFiles(Path("rows.csv")), RunSettings(Path("out")))


def test_ranges_and_lists_take_the_place_of_the_default_ones() -> None:
    space = parse_space(
        ["learning_rate=1e-4..3e-3:log", "rank=4, 8", "epochs=2..6", "rslora=yes,no", "init=pissa"], SETTINGS
    )
    assert space["learning_rate"] == Range(1e-4, 3e-3, log=True)
    assert space["rank"] == Choice((4, 8))
    assert space["epochs"] == Range(2, 6, whole=True)
    assert space["rslora"] == Choice((True, False))
    assert space["init"] == Choice(("pissa",))
    assert space["scheduler"] == default_space(SETTINGS)["scheduler"]


def test_the_default_space_lies_around_what_the_settings_say() -> None:
    space = default_space(SETTINGS.changed(learning_rate=1e-3, batch_size=1))
    rate = space["learning_rate"]
    assert isinstance(rate, Range)
    assert (rate.low, rate.high, rate.log) == (pytest.approx(1e-4), pytest.approx(5e-3), True)
    assert space["batch_size"] == Choice((1, 2))
    assert "epochs" not in space


def test_values_become_settings_of_their_types() -> None:
    made = applied(SETTINGS, {"scheduler": "cosine", "init": "olora", "rank": 4, "learning_rate": 0.1})
    assert made.optim.schedule is Schedule.COSINE
    assert made.lora.init is Init.OLORA
    assert (made.lora.rank, made.optim.learning_rate) == (4, 0.1)


def test_a_drawn_number_has_few_digits_and_stays_inside() -> None:
    assert Range(0.0, 1.0).rounded(0.123456) == 0.123
    assert Range(0.12345, 1.0).rounded(0.123451) == 0.12345


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rank", "is not NAME=VALUES"),
        ("ranks=4,8", "'ranks' is no parameter"),
        ("rank=4,eight", "rank: 'eight'"),
        ("rank=4,4", "has a value twice"),
        ("rank=0,4", "rank=0,4: is 0; allowed: 1 to 256"),
        ("dropout=0.5..0.1", "does not go from a lower to a higher"),
        ("dropout=0..0.2:log", "no logarithm at 0"),
        ("dropout=0..0.2:lin", "only :log may follow"),
        ("dropout=0..1.5", "dropout=0..1.5: is 1.5"),
        ("learning_rate=nan,1", "'nan'"),
        ("scheduler=linear..cosine", "is a range; list values, such as scheduler=linear,"),
        ("scheduler=linar", "scheduler: 'linar' is none of its values, such as linear,cosine"),
        ("rslora=maybe,yes", "such as yes,no"),
    ],
)
def test_what_cannot_be_searched_is_named_with_its_remedy(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_space([text], SETTINGS)
    assert caught.value.field == "search_space"
    assert why in caught.value.message


def test_a_space_of_single_values_is_no_search() -> None:
    single = [f"{name}={value}" for name, value in {"learning_rate": 1e-3, "rank": 4, "dropout": 0}.items()]
    with pytest.raises(InvalidRequest, match="nothing to search"):
        parse_space([*single, "scheduler=linear", "batch_size=8"], SETTINGS)


def test_the_flag_says_trials_and_a_time() -> None:
    assert search_options("trials=20", None, None) == SearchOptions(20, None, (), None)
    assert search_options("trials=20, timeout=1.5e3", ["rank=4,8"], None) == SearchOptions(
        20, 1500.0, ("rank=4,8",), None
    )
    assert search_options(None, None, None) is None


@pytest.mark.parametrize("text", ["20", "trials=", "trials=x", "timeout=5", "trials=1,trials=2", "trials=1,hours=2"])
def test_another_flag_is_refused_with_its_form(text: str) -> None:
    with pytest.raises(InvalidRequest, match="write trials=N or trials=N,timeout=SECONDS"):
        search_options(text, None, None)


def test_a_space_without_a_search_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="search_space: has no meaning without search"):
        search_options(None, ["rank=4,8"], None)
