"""Losses against torch, scikit-learn and their formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.loss import NAMES, ClassCounts, TargetKind, find_loss, named_loss

CLASSES, MULTI_LABEL = TargetKind.CLASSES, TargetKind.MULTI_LABEL
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
TARGETS = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])
COUNTS = ClassCounts(np.array([7, 3, 2]), 12)


def test_a_sum_over_the_number_of_targets_is_the_mean() -> None:
    found = named_loss("cross-entropy", CLASSES, None)(LOGITS, TARGETS, 12)
    assert torch.allclose(found, functional.cross_entropy(LOGITS, TARGETS))


def test_focal_is_its_formula_and_below_cross_entropy() -> None:
    p = torch.softmax(LOGITS, -1)[torch.arange(12), TARGETS]
    wanted = ((1 - p) ** 2 * -p.log()).mean()
    assert torch.allclose(named_loss("focal", CLASSES, None)(LOGITS, TARGETS, 12), wanted)


def test_label_smoothing_is_torchs() -> None:
    found = named_loss("label-smoothing", CLASSES, None)(LOGITS, TARGETS, 12)
    assert torch.allclose(found, functional.cross_entropy(LOGITS, TARGETS, label_smoothing=0.1))


def test_weights_are_those_scikit_learn_calls_balanced() -> None:
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=TARGETS.numpy())
    weight = torch.tensor(balanced, dtype=torch.float32)
    wanted = functional.cross_entropy(LOGITS, TARGETS, weight=weight, reduction="sum") / 12
    assert torch.allclose(named_loss("weighted", CLASSES, COUNTS)(LOGITS, TARGETS, 12), wanted)


def test_multi_label_losses_are_of_each_label() -> None:
    targets = functional.one_hot(TARGETS, 3).float()
    plain = functional.binary_cross_entropy_with_logits(LOGITS, targets)
    assert torch.allclose(named_loss("cross-entropy", MULTI_LABEL, None)(LOGITS, targets, 36), plain)
    p = torch.where(targets == 1, torch.sigmoid(LOGITS), 1 - torch.sigmoid(LOGITS))
    focal = named_loss("focal", MULTI_LABEL, None)(LOGITS, targets, 36)
    assert torch.allclose(focal, ((1 - p) ** 2 * -p.log()).mean())
    weights = torch.tensor([5 / 7, 9 / 3, 10 / 2])  # rows without the label over rows with it
    wanted = functional.binary_cross_entropy_with_logits(LOGITS, targets, pos_weight=weights)
    assert torch.allclose(named_loss("weighted", MULTI_LABEL, COUNTS)(LOGITS, targets, 36), wanted)


def test_a_regressions_loss_is_the_squared_error() -> None:
    found = named_loss("cross-entropy", TargetKind.VALUES, None)(LOGITS[:, 0], LOGITS[:, 1], 12)
    assert torch.allclose(found, functional.mse_loss(LOGITS[:, 0], LOGITS[:, 1]))


@pytest.mark.parametrize("kind", TargetKind)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_either_refused_for_a_kind_of_target_or_can_be_made(name: str, kind: TargetKind) -> None:
    refused = {
        TargetKind.POSITIONS: {"label-smoothing", "weighted"},
        TargetKind.VOCABULARY: {"weighted"},
        TargetKind.VALUES: {"focal", "label-smoothing", "weighted"},
    }
    if name in refused.get(kind, ()):
        with pytest.raises(InvalidRequest, match="choose cross-entropy"):
            find_loss(name, kind)
    else:
        assert find_loss(name, kind) is None
        assert callable(named_loss(name, kind, COUNTS))


def test_a_module_in_the_working_directory_is_found_and_its_faults_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_losses.py").write_text("def broken(logits, targets, num_items):\n    raise KeyError('weights')\n")
    monkeypatch.chdir(tmp_path)
    loss = find_loss("my_losses:broken", CLASSES)
    assert loss is not None
    with pytest.raises(InvalidRequest, match=r"my_losses:broken failed on logits \(12, 3\), targets \(12,\)"):
        loss(LOGITS, TARGETS, 12)
    (tmp_path / "not_python.py").write_text("def (")
    with pytest.raises(InvalidRequest, match="module 'not_python' cannot be imported"):
        find_loss("not_python:loss", CLASSES)
