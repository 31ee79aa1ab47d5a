"""`compare` finds what became slower beyond the noise, and compares nothing that is not comparable."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import compare as module
from tests.benchmarks.compare import NotComparable, compare, find_committed, main

RESULTS = Path(__file__).parent / "results"
Change = Callable[[dict[str, Any]], None]


def spread(median: float, low: float, high: float) -> dict[str, float]:
    return {"median": median, "low": low, "high": high}


def kernels() -> dict[str, Any]:
    return {
        "benchmark": "kernels",
        "better": "lower",
        "machine": {"processor": "P", "cores": 2, "system": "S", "versions": {"torch": "2.13.0"}},
        "settings": {"threads": 2, "dtype": "float32", "rounds": 7, "shapes": ["minilm"]},
        "ratios": {"a: own / floor": spread(1.2, 1.1, 1.3), "a: own / loop": spread(0.8, 0.7, 0.9)},
    }


def encoder() -> dict[str, Any]:
    return json.loads((RESULTS / "encoder-r8-qv.json").read_text(encoding="utf-8"))


def verdict(tmp_path: Path, old: dict[str, Any], new: dict[str, Any], *more: str) -> int:
    for name, result in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    return main([str(tmp_path / "new.json"), "--against", str(tmp_path / "old.json"), *more])


@pytest.mark.parametrize(
    ("now", "status", "word"),
    [
        (spread(1.5, 1.4, 1.6), 1, "slower"),
        (spread(1.0, 0.9, 1.05), 0, "faster"),
        (spread(1.32, 1.31, 1.33), 0, "slower"),  # moved, by less than the tolerance of a tenth
    ],
)
def test_a_kernel_time_that_moved_is_shown_and_fails_when_it_grew_by_more_than_the_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], now: dict[str, float], status: int, word: str
) -> None:
    old, new = kernels(), kernels()
    old["ratios"]["a: own / floor"] = spread(1.25, 1.1, 1.3)
    new["ratios"]["a: own / floor"] = now
    assert verdict(tmp_path, old, new) == status
    shown = capsys.readouterr().out
    assert "| a: own / floor | 1.25 (1.10 to 1.30) |" in shown and f"| {word} |" in shown
    assert "own / loop" not in shown


@pytest.mark.parametrize("now", [spread(1.29, 1.2, 1.8), spread(1.6, 1.15, 1.9), spread(1.2, 1.1, 1.3)])
def test_what_stays_within_either_spread_is_noise(tmp_path: Path, now: dict[str, float]) -> None:
    old, new = kernels(), kernels()
    new["ratios"]["a: own / floor"] = now
    assert verdict(tmp_path, old, new) == 0
    assert not any(move.beyond_spread for move in compare(new, old))


def test_the_tolerance_can_be_given(tmp_path: Path) -> None:
    old, new = kernels(), kernels()
    new["ratios"]["a: own / floor"] = spread(1.5, 1.4, 1.6)  # a quarter slower
    assert verdict(tmp_path, old, new, "--tolerance", "0.24") == 1
    assert verdict(tmp_path, old, new, "--tolerance", "0.26") == 0


@pytest.mark.parametrize(("factor", "status"), [(0.5, 1), (2.0, 0), (1.0, 0)])
def test_of_throughput_less_is_worse(tmp_path: Path, factor: float, status: int) -> None:
    old, new = encoder(), encoder()
    ratio = new["ratios"]["own_mixed / peft_mixed"]
    new["ratios"]["own_mixed / peft_mixed"] = {key: value * factor for key, value in ratio.items()}
    assert verdict(tmp_path, old, new) == status


def test_half_the_throughput_is_as_much_slower_as_twice_the_time() -> None:
    old, new = encoder(), encoder()
    new["ratios"]["own_mixed / own_base"] = {k: v / 2 for k, v in new["ratios"]["own_mixed / own_base"].items()}
    moves = {move.name: move for move in compare(new, old)}
    assert moves["own_mixed / own_base"].slowdown == pytest.approx(1.0)


def other_processor(new: dict[str, Any]) -> None:
    new["machine"]["processor"] = "Q"


def a_gpu(new: dict[str, Any]) -> None:
    new["machine"]["accelerator"] = {"name": "H100"}


def other_kind(new: dict[str, Any]) -> None:
    new["benchmark"] = "encoder"


def other_threads(new: dict[str, Any]) -> None:
    new["settings"]["threads"] = 1


def no_ratios(new: dict[str, Any]) -> None:
    del new["ratios"]


def other_cases(new: dict[str, Any]) -> None:
    new["ratios"] = {"b: own / floor": spread(1, 1, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_processor, "the machine's processor differs: 'Q' now, 'P' in the committed result"),
        (a_gpu, "the machine's accelerator differs: 'H100' now"),
        (other_kind, "the kind of benchmark differs"),
        (other_threads, "the setting threads differs: 1 now, 2"),
        (no_ratios, "the new result, of kind 'kernels', has no ratios"),
        (other_cases, "no ratio in common"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, message: str
) -> None:
    new = kernels()
    change(new)
    assert verdict(tmp_path, kernels(), new) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new.json").write_text("[]", encoding="utf-8")
    assert main([str(tmp_path / "new.json")]) == 2
    assert "is not a result file" in capsys.readouterr().err


def test_more_rounds_and_newer_packages_are_comparable_and_the_packages_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = kernels()
    new["settings"]["rounds"] = 20
    new["machine"]["versions"]["torch"] = "2.14.0"
    assert verdict(tmp_path, kernels(), new) == 0
    assert "versions differ: torch 2.13.0 → 2.14.0" in capsys.readouterr().out


def test_ratios_that_are_no_longer_measured_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = kernels()
    del new["ratios"]["a: own / loop"]
    assert verdict(tmp_path, kernels(), new) == 0
    assert "1 ratios of old.json are not in the new result" in capsys.readouterr().out


def test_the_committed_result_of_the_same_machine_and_settings_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, one_thread = kernels(), kernels()
    other_processor(elsewhere)
    other_threads(one_thread)
    committed = [("elsewhere.json", elsewhere), ("one.json", one_thread), ("here.json", kernels())]
    monkeypatch.setattr(module, "committed_results", lambda: committed)
    assert find_committed(kernels())[0] == "here.json"
    committed.append(("again.json", copy.deepcopy(kernels())))
    with pytest.raises(NotComparable, match=r"several committed results fit: here\.json, again\.json"):
        find_committed(kernels())
    del committed[2:]
    with pytest.raises(NotComparable, match=r"elsewhere\.json: the machine's processor differs"):
        find_committed(kernels())


def test_committed_results_are_read_from_git_not_from_the_working_tree() -> None:
    if not (module.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    committed = dict(module.committed_results())
    assert committed["encoder-r8-qv.json"]["benchmark"] == "encoder"
    assert find_committed(committed["encoder-r8-qv.json"])[0] == "encoder-r8-qv.json"
