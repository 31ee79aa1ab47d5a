"""The image of an adapter holds what it changes beside LoRA at its true size, and gives it back as views."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_runtime.adapters.checkpoint import read_checkpoint
from lora_runtime.adapters.image import extras_views, plan_image, write_image
from lora_runtime.arena import ALIGNMENT
from tests.unit.base_specs import spec_of
from tests.unit.peft_folders import NO_LIMIT, save

CONFIGS = {
    "gains and shifts": {"use_dora": True, "bias": "all"},
    "tables": {"target_modules": ["query", "word_embeddings"], "use_dora": True},
    "rows": {"trainable_token_indices": [7, 2]},
    "parameters": {"modules_to_save": ["LayerNorm"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_extras_come_back_as_they_were_read(tmp_path: Path, name: str) -> None:
    base = spec_of("bert")
    checkpoint = read_checkpoint(save("bert", "SEQ_CLS", tmp_path / "a", **CONFIGS[name]), base, NO_LIMIT)
    layout = plan_image(checkpoint, base.groups)
    run = torch.full((layout.num_elements,), float("nan"))
    write_image(checkpoint, layout, run)
    views = extras_views(layout, run)
    assert views.keys() == checkpoint.extras.keys() != set()
    for path, extra in checkpoint.extras.items():
        for param, array in extra.params.items():
            assert torch.equal(views[path].params[param], torch.from_numpy(array))
        for block, array in extra.blocks.items():
            view = views[path].tensors[block]
            assert torch.equal(view, torch.from_numpy(array))
            assert view.storage_offset() % ALIGNMENT == 0
        if extra.row_ids is not None:
            assert views[path].tensors["row_ids"].tolist() == sorted(extra.row_ids)
            assert views[path].tensors["row_ids"].dtype is torch.int64


def test_an_image_has_no_more_than_one_alignment_for_each_block(tmp_path: Path) -> None:
    base = spec_of("bert")
    checkpoint = read_checkpoint(save("bert", "SEQ_CLS", tmp_path / "a", use_dora=True), base, NO_LIMIT)
    blocks = len(checkpoint.params) + 2 * len(checkpoint.sites)
    blocks += sum(len(extra.blocks) + len(extra.params) for extra in checkpoint.extras.values())
    assert plan_image(checkpoint, base.groups).num_elements <= checkpoint.num_parameters + blocks * ALIGNMENT
