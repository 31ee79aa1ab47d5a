"""DP-SGD in the Trainer's loop: Poisson samples, gradients row by row, each cut to a norm, their sum with noise."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from lora_runtime.train.private.checks import check_private_model
from lora_runtime.train.private.settings import PrivacyBudget

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

_NOBODY = "nobody"  # of a batch that stands for a sample without rows


class PrivateSteps(Trainer):
    """Mixed in before a Trainer whose loss is the mean over a batch's rows when it is given no number of items.

    The optimizer sees (Σ_i clip(g_i, C) + N(0, σ²C²)) / (q·N): Opacus' hooks take g_i, its optimizer does the rest.
    Samples and noise come from generators that the system seeds: whoever knows `RunSettings.seed`, which the report
    tells, could else subtract the noise.
    """

    private_optimizer: DPOptimizer | None = None
    budget: PrivacyBudget

    def make_private(self, budget: PrivacyBudget) -> None:
        """Call it before training, and before an optimizer is made."""
        from opacus import GradSampleModule

        model = self.model
        assert model is not None
        check_private_model(model)
        self.budget = budget
        self.args.max_grad_norm = 0.0  # rows' gradients are cut, not their sum
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="opacus")
            # its hooks are on the layers themselves, so the model is called and saved as it was
            self._hooks = GradSampleModule(model, loss_reduction="mean")

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Each row is in a sample with the same probability, independently of the others."""
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        rows: Any = self.train_dataset
        steps = round(1 / self.budget.sample_rate)
        sampler = UniformWithReplacementSampler(
            num_samples=len(rows),
            sample_rate=self.budget.sample_rate,
            generator=secret_generator(torch.device("cpu")),
            steps=steps,
        )
        collate: Callable[[list[Any]], Any] = self.data_collator

        def collate_some(sample: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collate(sample or [rows[0]]), _NOBODY: torch.tensor(not sample)}

        return DataLoader(rows, batch_sampler=sampler, collate_fn=collate_some)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """What would be used otherwise, given clipped and noisy gradients."""
        from opacus.optimizers import DPOptimizer

        if self.private_optimizer is None:
            self.private_optimizer = DPOptimizer(
                super().create_optimizer(model),
                noise_multiplier=self.budget.noise_multiplier,
                max_grad_norm=self.budget.max_grad_norm,
                expected_batch_size=self.budget.expected_batch_size,  # pyright: ignore[reportArgumentType] - it divides
                generator=secret_generator(self.args.device),
                secure_mode=True,  # four draws a value, against what floating point betrays (Holohan and Braghin 2021)
            )
            self.optimizer = self.private_optimizer
        return self.private_optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer clears the gradients of sums alone."""
        assert self.private_optimizer is not None
        self.private_optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # the inputs of the first layers have no gradient, which the hooks on their outputs do not need
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over the rows of the sample; a sample without rows has a gradient of zero, and its noise."""
        batch = dict(inputs)
        is_nobody = batch.pop(_NOBODY, None)
        if is_nobody is not None and bool(is_nobody):
            del batch["labels"]
            return model(**batch).logits.sum() * 0.0
        given = num_items_in_batch if is_nobody is None else None  # None: of a training step
        return super().compute_loss(model, batch, return_outputs, given)


def secret_generator(device: torch.device) -> torch.Generator:
    """A generator that nobody can seed again."""
    return torch.Generator(device).manual_seed(secrets.randbits(63))
