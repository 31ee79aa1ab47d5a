"""Singular values by the Gram matrix against numpy's SVD, ranks, names in PEFT's config, and the streamed file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_runtime.errors import InvalidRequest
from lora_runtime.svd.layout import rank_fields, target_names, whole_names
from lora_runtime.svd.settings import RankRule
from lora_runtime.svd.sites import kind_of_path, natural_order
from lora_runtime.svd.spectrum import Spectrum, decompose
from lora_runtime.svd.writer import TensorWriter


def falling(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall by three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, width, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -3, width, dtype=torch.float64)
    return ((left * values) @ right.T).float()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (1, 12), (2000, 7)])
def test_energies_and_errors_are_those_of_numpys_svd(shape: tuple[int, int]) -> None:
    matrix = falling(*shape, seed=sum(shape))
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    found = decompose(matrix)
    for rank in range(1, min(shape) + 1):
        assert found.spectrum.energy(rank) == pytest.approx(values[:rank].sum() / values.sum(), rel=1e-9)
        a, b = found.factors(rank, torch.float32)
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        best = (values[rank:].sum() / values.sum()) ** 0.5  # Eckart and Young
        assert float((matrix - b @ a).norm() / matrix.norm()) == pytest.approx(best, rel=1e-4, abs=3e-7)
        assert found.error(a, b) == pytest.approx(best, rel=1e-4, abs=3e-7)


def test_singular_values_are_shared_out_evenly_between_the_factors() -> None:
    matrix = falling(20, 30, seed=1)
    a, b = decompose(matrix).factors(5, torch.float32)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:5]
    for factor in (a @ a.T, b.T @ b):
        assert np.allclose(factor.numpy(), np.diag(values), atol=1e-6)


def test_rounding_of_the_factors_counts_in_the_error_and_overflow_is_refused() -> None:
    matrix = falling(20, 30, seed=2)
    found = decompose(matrix)
    full = found.factors(20, torch.bfloat16)
    assert 1e-3 < found.error(*full) < 1e-2
    assert found.error(*found.factors(20, torch.float32)) < 1e-6
    with pytest.raises(InvalidRequest, match="float16 cannot hold"):
        decompose(matrix * 1e20).factors(2, torch.float16)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_least_that_keeps_it(values: list[float], energy: float) -> None:
    spectrum = Spectrum(np.sort(np.array(values) ** 2)[::-1].copy())
    rank = RankRule(energy=energy).choose(spectrum)
    assert spectrum.energy(rank) >= energy - 1e-12
    assert rank == 1 or spectrum.energy(rank - 1) < energy


def test_ranks_are_bounded_by_what_is_there() -> None:
    spectrum = decompose(falling(30, 3, seed=3) @ torch.eye(3, 40)).spectrum
    assert spectrum.numerical_rank == 3
    assert RankRule(rank=16).choose(spectrum) == 3
    assert RankRule(energy=1.0).choose(spectrum) == 3
    assert RankRule(energy=1.0, max_rank=2).choose(spectrum) == 2
    assert RankRule(rank=4).choose(Spectrum(np.zeros(8))) == 1


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "rank"),
        ({"rank": 4, "energy": 0.9}, "rank"),
        ({"rank": 0}, "rank"),
        ({"energy": 1.5}, "energy"),
        ({"energy": float("nan")}, "energy"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank"),
        ({"rank": 8, "max_rank": 4}, "max_rank"),
    ],
)
def test_a_rule_that_says_nothing_or_two_things_is_refused(values: dict[str, float], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        RankRule(**values)  # pyright: ignore[reportArgumentType]
    assert caught.value.field == field


def test_rank_patterns_are_of_one_module_each() -> None:
    """By PEFT's own rule, `(.*\\.)?(pattern)$` matched from the start."""
    ranks = {"a.layers.1.q": 4, "a.layers.11.q": 4, "layers.1.q": 7, "a.layers.1xq": 9}
    fields = rank_fields(ranks)
    assert (fields["r"], fields["lora_alpha"]) == (4, 4)
    assert fields["rank_pattern"] == fields["alpha_pattern"]
    for path, rank in ranks.items():
        hits = [v for pattern, v in fields["rank_pattern"].items() if re.match(rf"(.*\.)?({pattern})$", path)]
        assert hits == ([] if rank == 4 else [rank])


def test_names_are_short_where_all_layers_are_meant_and_whole_where_not() -> None:
    modules = [f"m.layers.{i}.{name}" for i in range(3) for name in ("q", "k", "up_q")] + ["m.words", "head"]
    chosen = {f"m.layers.{i}.q" for i in range(3)} | {"m.layers.1.k", "m.words"}
    assert target_names(chosen, modules) == ["m.layers.1.k", "m.words", "q"]
    assert whole_names({f"m.layers.{i}.q" for i in range(3)}, modules) == [f"m.layers.{i}.q" for i in range(3)]


def test_a_streamed_file_holds_every_tensor_aligned(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, dtype=torch.float64).half(),  # an odd number of two bytes each
        "wide": torch.randn(2, 3),
        "brain": torch.randn(5).bfloat16(),
        "transposed": torch.randn(4, 6).T,
        "empty": torch.zeros(0, 4),
        "second half": torch.randn(1).half(),
        "double": torch.randn(2, dtype=torch.float64),
    }
    writer = TensorWriter(tmp_path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert writer.close() == (tmp_path / "adapter_model.safetensors").stat().st_size
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype is tensor.dtype for name, tensor in tensors.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    assert writer.num_parameters == sum(tensor.numel() for tensor in tensors.values())


def test_layers_are_sorted_by_number_and_share_a_kind() -> None:
    paths = ["a.layers.10.q", "a.layers.2.q", "a.layers.2.k", "a.head"]
    assert sorted(paths, key=natural_order) == ["a.head", "a.layers.2.k", "a.layers.2.q", "a.layers.10.q"]
    assert [kind_of_path(path) for path in paths] == ["q", "q", "k", "a.head"]
