"""Private training: what each row can do to a step, the noise, the samples, and Opacus' own count of ε."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import Tensor
from typer.testing import CliRunner

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.private import trainer
from lora_runtime.train.private.accounting import plan_privacy, spent_privacy
from lora_runtime.train.private.checks import check_private
from lora_runtime.train.private.settings import Privacy
from lora_runtime.train.private.trainer import PrivateSteps
from lora_runtime.train.processes import Process
from lora_runtime.train.rows.classify import ClassifySchema
from lora_runtime.train.run import train
from lora_runtime.train.settings import BaseBits, Init, Optimizer, Precision, TrainSettings
from lora_runtime.train.tasks.options import ClassifyOptions
from lora_runtime.types import ProblemType
from server.cli_train import train_app
from tests.training import make_bases, topics, write_rows

CLIP = 0.5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bases(tmp_path_factory.mktemp("bases"), ("steady",))["steady"]


@pytest.fixture
def settings(tmp_path: Path, base: str) -> TrainSettings:
    return topics(tmp_path, base)


def private(settings: TrainSettings, **fields: Any) -> TrainSettings:
    return settings.changed(task=ClassifyOptions(privacy=Privacy(**fields)))


def opacus_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=sigma, sample_rate=rate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order")
        return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("sigma", "steps_per_epoch", "epochs"), [(0.8, 50, 2), (1.5, 10, 30), (4.0, 1, 5)])
def test_epsilon_is_that_of_opacus_accountant(sigma: float, steps_per_epoch: int, epochs: int) -> None:
    budget = plan_privacy(Privacy(noise_multiplier=sigma, delta=1e-5), 1000, steps_per_epoch, epochs)
    rate, steps = 1 / steps_per_epoch, steps_per_epoch * epochs
    assert budget.epsilon == pytest.approx(opacus_epsilon(sigma, rate, steps, 1e-5), rel=1e-9)
    early = spent_privacy(budget, steps // 2)
    assert early.epsilon == pytest.approx(opacus_epsilon(sigma, rate, steps // 2, 1e-5), rel=1e-9)
    assert early.epsilon < budget.epsilon


def test_the_noise_for_an_epsilon_keeps_it_and_wastes_little() -> None:
    budget = plan_privacy(Privacy(epsilon=3.0), 2000, 40, 5)
    assert budget.delta == pytest.approx(1 / 20_000)
    assert 2.9 < budget.epsilon <= 3.0
    assert budget.epsilon == pytest.approx(opacus_epsilon(budget.noise_multiplier, 1 / 40, 200, budget.delta), rel=1e-9)


def test_an_epsilon_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="epsilon: 1e-06 at delta 1e-09 cannot be kept"):
        plan_privacy(Privacy(epsilon=1e-6, delta=1e-9), 100, 10, 1)


def test_a_delta_that_could_give_a_row_away_is_warned_of() -> None:
    assert plan_privacy(Privacy(noise_multiplier=1.0, delta=0.02), 50, 5, 1).warning is not None
    assert plan_privacy(Privacy(noise_multiplier=1.0, delta=0.019), 50, 5, 1).warning is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"epsilon": 1.0, "noise_multiplier": 1.0},
        {"epsilon": 0.0},
        {"noise_multiplier": -1.0},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "max_grad_norm": 0.0},
    ],
)
def test_values_without_a_meaning_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        Privacy(**fields)


@dataclass
class Step:
    """The first step: its batch, the model before it, and the gradients as the optimizer got them."""

    size: int
    oracle: list[Tensor]  # of each row, all parameters in one vector
    summed: Tensor  # of the rows' cut gradients
    noisy: Tensor  # with noise, over the expected rows


class FirstStepDone(Exception):
    pass


def first_step(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> Step:
    """Run one step, and take each row's gradient by autograd alone, one row at a time, at the same weights."""
    original: Callable[..., Tensor] = PrivateSteps.training_step
    found: list[Step] = []

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._hooks.disable_hooks()
        model.eval()
        rows: list[Tensor] = []
        kind = self._task.problem_type
        for at in range(len(inputs["labels"])):
            row = {key: value[at : at + 1] for key, value in inputs.items() if key not in ("labels", "nobody")}
            logits, label = model(**row).logits, inputs["labels"][at : at + 1]
            if kind is ProblemType.REGRESSION:
                loss = torch.nn.functional.mse_loss(logits[:, 0], label)
            elif kind is ProblemType.MULTI_LABEL:
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label)
            else:
                loss = torch.nn.functional.cross_entropy(logits, label)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
        self._hooks.enable_hooks()
        loss = original(self, model, inputs, *args, **kwargs)

        def done(optimizer: Any) -> None:
            summed = torch.cat([p.summed_grad.reshape(-1) for p in optimizer.params])
            noisy = torch.cat([p.grad.reshape(-1) for p in optimizer.params])
            # the optimizer has its own order of parameters
            order = {id(p): place for place, p in enumerate(parameters)}
            sizes = [p.numel() for p in parameters]
            places = [order[id(p)] for p in optimizer.params]
            ordered = [torch.cat([row.split(sizes)[place] for place in places]) for row in rows]
            found.append(Step(len(inputs["labels"]), ordered, summed, noisy))
            raise FirstStepDone

        self.private_optimizer.attach_step_hook(done)
        return loss

    monkeypatch.setattr(PrivateSteps, "training_step", spy)
    with pytest.raises(FirstStepDone):
        train(settings)
    monkeypatch.setattr(PrivateSteps, "training_step", original)
    return found[0]


def cut(gradient: Tensor, norm: float = CLIP) -> Tensor:
    return gradient * min(1.0, norm / float(gradient.norm()))


def test_every_rows_gradient_is_cut_and_the_noise_is_as_told(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = 0.96  # cuts some of the rows and leaves others as they are
    settings = private(settings, noise_multiplier=2.0, max_grad_norm=clip).changed(batch_size=90)
    step = first_step(settings, monkeypatch)
    assert step.size == 90  # a sample of all: one step an epoch
    norms = [float(row.norm()) for row in step.oracle]
    assert min(norms) < clip < max(norms), norms
    expected = torch.stack([cut(row, clip) for row in step.oracle]).sum(0)
    torch.testing.assert_close(step.summed, expected, rtol=1e-4, atol=1e-5)
    noise = step.noisy * 90 - step.summed  # of 3,683 parameters
    assert float(noise.std()) == pytest.approx(2.0 * clip, rel=0.06)
    assert abs(float(noise.mean())) < 0.15


@pytest.mark.parametrize("kind", [ProblemType.REGRESSION, ProblemType.MULTI_LABEL])
def test_one_row_with_a_huge_gradient_moves_a_step_no_further_than_the_clip(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, kind: ProblemType
) -> None:
    loud = "1e6" if kind is ProblemType.REGRESSION else "colours|metals|animals"
    words = {"colours": 1, "metals": 2, "animals": 3, "flowers": 1.5}
    labels = words.values() if kind is ProblemType.REGRESSION else words
    lines = ["text,label", *(f"a {word} thing,{label}" for word, label in zip(words, labels, strict=True))]
    steps: list[Step] = []
    for rows in (lines, [*lines, f"an odd thing,{loud}"]):
        settings.data.train.write_text("\n".join(rows) + "\n")
        valid = settings.data.valid
        assert valid is not None
        valid.write_text("\n".join(lines) + "\n")
        options = ClassifyOptions(ClassifySchema(problem_type=kind), Privacy(noise_multiplier=1.0, max_grad_norm=CLIP))
        steps.append(first_step(settings.changed(task=options, batch_size=8), monkeypatch))
    without, with_it = steps
    assert [step.size for step in steps] == [4, 5]
    if kind is ProblemType.REGRESSION:
        assert float(with_it.oracle[-1].norm()) > 1e4
    expected = torch.stack([cut(row) for row in with_it.oracle]).sum(0)
    torch.testing.assert_close(with_it.summed, expected, rtol=1e-4, atol=1e-5)
    assert float((with_it.summed - without.summed).norm()) <= CLIP * (1 + 1e-4)


@pytest.mark.slow
def test_it_learns_what_can_be_learnt_and_tells_what_it_spent(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "secret_generator", lambda device: torch.Generator(device).manual_seed(7))
    write_rows(settings.data.train, 400, 1)
    settings = private(settings, noise_multiplier=0.9).changed(batch_size=40, epochs=6, learning_rate=5e-2, report=True)
    report = train(settings)
    assert report.best.metrics["accuracy"] > report.plan.baseline["accuracy"] + 0.3
    spent, planned = report.privacy, report.plan.privacy
    assert spent is not None
    assert spent == planned
    assert spent.num_steps == len(report.step_losses) == 60
    assert spent.epsilon == pytest.approx(
        opacus_epsilon(spent.noise_multiplier, spent.sample_rate, 60, spent.delta), rel=1e-9
    )
    text = (settings.run.out / "report.md").read_text()
    assert f"| ε | {spent.epsilon:.4g} |" in text
    assert "Poisson, each of 400 rows with probability 0.1 a step" in text
    assert "The validation rows. The kept pass" in text
    assert "## Examples" not in text  # they would be rows


def test_samples_differ_in_size_may_be_empty_and_nobody_can_repeat_them(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(settings.data.train, 20, 1)
    settings = private(settings, noise_multiplier=1.0).changed(batch_size=1, epochs=1)
    sizes: list[list[int]] = []
    silent: list[bool] = []
    original: Callable[..., Tensor] = PrivateSteps.training_step

    def spy(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, model, inputs, *args, **kwargs)
        is_nobody = bool(inputs["nobody"])
        sizes[-1].append(0 if is_nobody else len(inputs["labels"]))
        if is_nobody:
            silent.append(all(float(g.abs().max()) == 0 for g in self.private_optimizer.grad_samples))
        return loss

    monkeypatch.setattr(PrivateSteps, "training_step", spy)
    weights: list[bytes] = []
    for name in ("one", "two"):
        sizes.append([])
        run = settings.changed(out=settings.run.out.with_name(name))
        train(run)
        weights.append((run.run.out / "adapter_model.safetensors").read_bytes())
    both = [*sizes[0], *sizes[1]]
    assert len(both) == 40
    assert 8 < sum(both) < 80  # 40 expected, of a standard deviation of 6
    assert both.count(0) == len(silent) >= 1  # 14 expected
    assert all(silent)
    assert sizes[0] != sizes[1]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gradient_accumulation", 2),
        ("gradient_checkpointing", True),
        ("loss", "weighted"),
        ("loss", "tests.training:topics"),
        ("init", Init.EVA),
        ("dora", True),
        ("optimizer", Optimizer.LORA_FA),
        ("precision", Precision.BF16),
        ("quantize", BaseBits.NF4),
    ],
)
def test_what_breaks_the_guarantee_is_refused(settings: TrainSettings, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="is not for private training; allowed:") as caught:
        check_private(private(settings, epsilon=1.0).changed(**{field: value}), Process())
    assert caught.value.field == field
    check_private(settings.changed(**{field: value}), Process())


def test_several_processes_are_refused(settings: TrainSettings) -> None:
    with pytest.raises(InvalidRequest, match="runs in one process"):
        check_private(private(settings, epsilon=1.0), Process(0, 2))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--private"], "epsilon: or noise_multiplier is needed"),
        (["--epsilon", "3"], "epsilon: has no meaning without private"),
        (["--private", "--epsilon", "3", "--search", "trials=2"], "search: is not for private training"),
    ],
)
def test_the_command_names_what_is_missing(settings: TrainSettings, flags: list[str], why: str) -> None:
    arguments = ["--base", settings.base, "--train", str(settings.data.train), "--out", str(settings.run.out)]
    done = CliRunner().invoke(train_app, ["classify", *arguments, *flags])
    assert done.exit_code == 1
    assert why in " ".join(done.stderr.split())
    assert not settings.run.out.exists()
