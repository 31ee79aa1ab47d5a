"""MKL's batched product: right for any shapes, on as many threads as torch has, refused where it is not right."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.kernels.gemm_batch import GemmBatch, Products, addresses

FOUND = GemmBatch.find()
pytestmark = pytest.mark.skipif(FOUND is None, reason="this build of torch has no MKL")


def gemm() -> GemmBatch:
    assert FOUND is not None
    return FOUND


@pytest.fixture
def fresh_search() -> Generator[None]:
    """`find` looks once a process; here it looks again, before and after."""
    GemmBatch.find.cache_clear()
    yield
    GemmBatch.find.cache_clear()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 300)), min_size=0, max_size=12),
    beta=st.sampled_from([0.0, 1.0]),
)
def test_products_of_any_shapes_are_torchs(shapes: list[tuple[int, int, int]], beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n, k = np.array(shapes, dtype=np.int32).reshape(-1, 3).T

    def places(sizes: np.ndarray) -> np.ndarray:
        return sizes.astype(np.int64).cumsum() - sizes

    at = [places(m * k), places(k * n), places(m * n)]
    a, b, c = (torch.randn(int(sizes.sum()), generator=generator) for sizes in (m * k, k * n, m * n))
    alpha = np.arange(1, len(shapes) + 1, dtype=np.float32) / 4
    wanted = c.double()
    for i, (rows, columns, depth) in enumerate(shapes):
        left = a[at[0][i] :][: rows * depth].view(rows, depth).double()
        right = b[at[1][i] :][: depth * columns].view(depth, columns).double()
        out = wanted[at[2][i] :][: rows * columns].view(rows, columns)
        out.mul_(beta).addmm_(left, right, alpha=float(alpha[i]))
    products = Products(len(shapes), (m, n, k), (k, n, n), at[0], at[2], beta=beta)
    products.alpha[:] = alpha
    if beta == 0.0:
        c.fill_(float("nan"))  # what is not added to is not read
    gemm().run(products, a, addresses(b, at[1]), c)
    assert (c.double() - wanted).norm() <= 1e-5 * (wanted.norm() or 1.0)


def test_it_computes_on_as_many_threads_as_torch_was_given() -> None:
    """The processor's time of the whole process, over the clock's: about one thread's."""
    count, size = 64, 96
    places = np.arange(count, dtype=np.int64) * size * size
    a, b, c = (torch.randn(count * size * size) for _ in range(3))
    products = Products(count, (size, size, size), (size, size, size), places, places)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        gemm().run(products, a, addresses(b, places), c)
        wall, busy = time.perf_counter(), time.process_time()
        for _ in range(50):
            gemm().run(products, a, addresses(b, places), c)
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
    finally:
        torch.set_num_threads(before)
    assert busy <= 1.3 * wall


@pytest.mark.usefixtures("fresh_search")
def test_a_routine_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GemmBatch.run

    def wrong(self: GemmBatch, products: Products, a: torch.Tensor, b: np.ndarray, c: torch.Tensor) -> None:
        right(self, products, a, b, c)
        c[-1] += 1.0

    monkeypatch.setattr(GemmBatch, "run", wrong)
    assert GemmBatch.find() is None


@pytest.mark.usefixtures("fresh_search")
def test_a_torch_without_mkl_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert GemmBatch.find() is None
