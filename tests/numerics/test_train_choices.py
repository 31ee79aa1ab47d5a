"""LoRA's variants, optimizers, schedules and losses: what is written is what was trained, on the clean base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.progress import SilentObserver
from lora_runtime.train.run import train
from lora_runtime.train.settings import BaseBits, DeviceChoice, Init, Optimizer, Precision, Schedule, TrainSettings
from tests.training import FILES, make_bases, peft_scores, topics


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"), ("bert", "steady", "gpt2"))


@pytest.fixture
def settings(tmp_path: Path, bases: dict[str, str]) -> TrainSettings:
    return topics(tmp_path, bases["bert"])


def config_of(settings: TrainSettings) -> dict[str, Any]:
    return json.loads((settings.run.out / "adapter_config.json").read_text())


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"dora": True}),
    ("bert", {"rslora": True, "alpha": 4.0}),
    ("bert", {"init": Init.PISSA}),
    ("bert", {"init": Init.PISSA, "rslora": True, "dora": True}),
    ("bert", {"init": Init.OLORA, "alpha": 4.0}),
    ("bert", {"init": Init.EVA}),
    ("gpt2", {"init": Init.PISSA, "alpha": 4.0}),
    ("gpt2", {"init": Init.EVA}),
    ("gpt2", {"dora": True}),
]


@pytest.mark.parametrize(("base", "choices"), VARIANTS, ids=str)
def test_peft_on_the_clean_base_has_the_trained_models_own_loss(
    settings: TrainSettings, bases: dict[str, str], base: str, choices: dict[str, Any]
) -> None:
    settings = settings.changed(base=bases[base], **choices)
    report = train(settings)
    accuracy, loss = peft_scores(settings, report.plan.labels)
    assert loss == pytest.approx(report.best.valid_loss, rel=1e-4)
    assert accuracy == pytest.approx(report.best.metrics["accuracy"])
    assert accuracy > report.plan.baseline["accuracy"] + 0.2
    config = config_of(settings)
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if settings.lora.init in (Init.PISSA, Init.OLORA) else 4)
    assert (config["use_dora"], config["use_rslora"]) == (settings.lora.dora, settings.lora.rslora)


def test_the_trained_models_logits_are_reproduced_after_conversion(settings: TrainSettings) -> None:
    """Not only the loss: every logit of the validation rows, against those of the run itself."""
    from lora_runtime.train import fitting

    kept: list[Any] = []
    run = fitting.Fitting.run

    def recorded(self: fitting.Fitting) -> fitting.Fitted:
        kept.append(run(self))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.Fitting, "run", recorded)
        report = train(settings.changed(init=Init.PISSA, learning_rate=5e-3))
    from lora_runtime.train.rows.classify import ClassifySchema, read_classify_rows
    from tests.training import peft_logits

    assert settings.data.valid is not None
    texts = [row.text for row in read_classify_rows(settings.data.valid, ClassifySchema())]
    found = peft_logits(settings, len(report.plan.labels), texts)
    wanted = torch.from_numpy(kept[0].predictions[0])
    assert torch.allclose(found, wanted, atol=1e-4)


def test_eva_begins_with_the_principal_directions_of_the_rows(settings: TrainSettings) -> None:
    """A's rows after one step at no learning rate are orthonormal and differ from a drawn A."""
    settings = settings.changed(epochs=1, learning_rate=1e-12, init=Init.EVA, target_modules=("query",))
    train(settings)
    tensors = load_file(settings.run.out / "adapter_model.safetensors")
    rows = [value for name, value in tensors.items() if "lora_A" in name]
    assert len(rows) == 2
    for a in rows:
        assert torch.allclose(a @ a.T, torch.eye(4), atol=1e-3)


def test_eva_takes_rows_shorter_than_the_rank_together(
    settings: TrainSettings, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings.changed(init=Init.EVA, rank=24, batch_size=1, epochs=1)
    train(settings)
    assert capfd.readouterr() == ("", "")
    settings.data.train.write_text("".join(settings.data.train.read_text().splitlines(keepends=True)[:6]))
    with pytest.raises(InvalidRequest, match="eva needs 64 tokens of training rows for this rank; there are"):
        train(settings.changed(rank=32, overwrite=True))


OPTIMISERS: list[dict[str, Any]] = [
    {"optimizer": Optimizer.ADAM, "weight_decay": 0.0, "epochs": 8},
    {"optimizer": Optimizer.LORA_FA, "epochs": 12},
    {"loraplus_ratio": 4.0, "learning_rate": 1e-2},
    {"schedule": Schedule.COSINE},
    {"schedule": Schedule.REDUCE_ON_PLATEAU},
    {"loss": "focal"},
    {"eval_steps": 7},
]


@pytest.mark.parametrize("choices", OPTIMISERS, ids=str)
def test_every_optimizer_schedule_and_loss_learns(settings: TrainSettings, choices: dict[str, Any]) -> None:
    report = train(settings.changed(**{"epochs": 6, **choices}))
    assert report.best.metrics["accuracy"] > report.plan.baseline["accuracy"] + 0.3


def test_lora_fa_leaves_a_where_it_began(settings: TrainSettings) -> None:
    def a_of(**choices: Any) -> list[torch.Tensor]:
        train(settings.changed(overwrite=True, **choices))
        tensors = load_file(settings.run.out / "adapter_model.safetensors")
        return [value for name, value in sorted(tensors.items()) if "lora_A" in name]

    frozen = a_of(optimizer=Optimizer.LORA_FA, epochs=1)
    assert all(map(torch.equal, frozen, a_of(optimizer=Optimizer.LORA_FA, epochs=2)))
    assert not any(map(torch.equal, frozen, a_of(epochs=1)))


def weights_of(settings: TrainSettings) -> dict[str, torch.Tensor]:
    train(settings.changed(overwrite=True))
    return load_file(settings.run.out / "adapter_model.safetensors")


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=tolerance), name


@pytest.mark.parametrize("loss", ["cross-entropy", "weighted"])
def test_accumulated_passes_are_one_larger_batch(settings: TrainSettings, bases: dict[str, str], loss: str) -> None:
    settings = settings.changed(base=bases["steady"], epochs=1, loss=loss, learning_rate=1e-3)
    whole = weights_of(settings.changed(batch_size=16))
    assert_close(weights_of(settings.changed(batch_size=4, gradient_accumulation=4)), whole, 2e-5)


def test_gradient_checkpointing_changes_nothing_but_memory(settings: TrainSettings, bases: dict[str, str]) -> None:
    settings = settings.changed(base=bases["steady"], epochs=1, learning_rate=1e-3)
    assert_close(weights_of(settings.changed(gradient_checkpointing=True)), weights_of(settings), 1e-6)


def test_bf16_trains_fp32_parameters(settings: TrainSettings) -> None:
    report = train(settings.changed(precision=Precision.BF16, epochs=5))
    assert report.best.metrics["accuracy"] > report.plan.baseline["accuracy"] + 0.3
    tensors = load_file(settings.run.out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_olora_is_refused_on_transposed_layers(settings: TrainSettings, bases: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="as those of GPT2ForSequenceClassification are; choose pissa"):
        train(settings.changed(base=bases["gpt2"], init=Init.OLORA))


def test_the_warm_up_of_reduce_on_plateau_rises_to_the_peak_and_is_then_left_alone(settings: TrainSettings) -> None:
    rates: list[float] = []

    class Rates(SilentObserver):
        def on_step(self, step: int, loss: float) -> None:
            del step, loss
            rates.append(optimizers[0].param_groups[0]["lr"])

    optimizers: list[torch.optim.Optimizer] = []
    made = torch.optim.Adam.__init__

    def noted(self: torch.optim.Adam, *given: Any, **options: Any) -> None:
        optimizers.append(self)
        made(self, *given, **options)

    settings = settings.changed(
        schedule=Schedule.REDUCE_ON_PLATEAU, optimizer=Optimizer.ADAM, warmup_ratio=0.2, learning_rate=1e-2, epochs=5
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "__init__", noted)
        report = train(settings, Rates())
    warmup = round(0.2 * report.plan.num_steps)
    assert rates[:warmup] == pytest.approx([1e-2 * step / warmup for step in range(warmup)])
    assert rates[warmup] == pytest.approx(1e-2)


def test_early_stopping_ends_the_run_and_keeps_the_best(settings: TrainSettings) -> None:
    report = train(settings.changed(learning_rate=0.3, schedule=Schedule.CONSTANT, epochs=30, patience=2))
    assert report.stopped_early
    assert len(report.passes) < 30
    assert report.passes.index(report.best) == len(report.passes) - 3


def test_a_loss_of_ones_own_is_used(settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_loss.py").write_text(
        "import torch\n"
        "def doubled(logits, targets, num_items):\n"
        "    return 2 * torch.nn.functional.cross_entropy(logits, targets, reduction='sum') / num_items\n"
        "def vector(logits, targets, num_items):\n"
        "    return logits\n"
    )
    plain = train(settings.changed(epochs=1, learning_rate=1e-12))
    report = train(settings.changed(epochs=1, learning_rate=1e-12, overwrite=True, loss="own_loss:doubled"))
    assert report.best.valid_loss == pytest.approx(2 * plain.best.valid_loss, rel=1e-5)
    with pytest.raises(InvalidRequest, match="returned a tensor of shape"):
        train(settings.changed(overwrite=True, loss="own_loss:vector"))


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"loss": "hinge"}, "loss", "is not known; choose cross-entropy"),
    ({"loss": "absent_module:f"}, "loss", "cannot be imported"),
    ({"loss": "json:f"}, "loss", "has no function 'f'"),
    ({"quantize": BaseBits.NF4, "device": DeviceChoice.CPU}, "quantize", "needs a CUDA device"),
    ({"init": Init.PISSA, "rank": 33}, "rank", "is 33, and pissa finds at most 32"),
    ({"init": Init.EVA, "rank": 65}, "rank", "is 65, and eva finds at most 32"),
    ({"gradient_checkpointing": True, "max_length": 4096}, "max_length", "the base allows 512"),
]
if not torch.cuda.is_available():
    REFUSED.append(({"device": DeviceChoice.CUDA}, "device", "cuda was asked for"))


@pytest.mark.parametrize(("change", "field", "says"), REFUSED, ids=str)
def test_what_cannot_be_had_is_refused_and_nothing_is_written(
    settings: TrainSettings, change: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        train(settings.changed(**change))
    assert caught.value.field == field
    assert not settings.run.out.parent.exists() or list(settings.run.out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"optimizer": Optimizer.LORA_FA, "dora": True}, "optimizer"),
        ({"optimizer": Optimizer.LORA_FA, "loraplus_ratio": 4.0}, "loraplus_ratio"),
        ({"quantize": BaseBits.INT8, "init": Init.PISSA}, "init"),
        ({"rank": 200, "init": Init.OLORA}, "rank"),
        ({"patience": 0}, "patience"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(
    settings: TrainSettings, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        settings.changed(**change)
    assert caught.value.field == field


def test_tensorboard_gets_the_losses(settings: TrainSettings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(settings.changed(epochs=1, tensorboard=tmp_path / "board"))
    assert list((tmp_path / "board").glob("events.*"))
    assert {path.name for path in settings.run.out.iterdir()} == FILES


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [BaseBits.NF4, BaseBits.INT8])
@pytest.mark.parametrize("init", [Init.DEFAULT, Init.EVA])
def test_a_base_in_few_bits_trains_an_adapter_of_the_whole_base(
    settings: TrainSettings, bits: BaseBits, init: Init
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = settings.changed(quantize=bits, precision=Precision.BF16, init=init, epochs=6)
    report = train(settings)
    accuracy, _ = peft_scores(settings, report.plan.labels)
    assert report.plan.device == "cuda:0"
    assert accuracy > report.plan.baseline["accuracy"] + 0.2


@pytest.mark.gpu
def test_a_run_on_the_gpu_is_that_of_the_cpu(settings: TrainSettings, bases: dict[str, str]) -> None:
    settings = settings.changed(base=bases["steady"], epochs=1, learning_rate=1e-3)
    wanted = weights_of(settings.changed(device=DeviceChoice.CPU))
    assert_close(weights_of(settings.changed(device=DeviceChoice.CUDA)), wanted, 1e-4)
