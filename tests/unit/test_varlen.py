"""Every way to attend within packed sequences gives what each sequence gives alone."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from lora_runtime.arena import RankArena, SlotTable
from lora_runtime.batch import Batch, Row, Step
from lora_runtime.kernels.grouped_lora.reference import ReferenceGroupedLora
from lora_runtime.model import varlen
from lora_runtime.model.varlen import AttentionKind, Masking, attend, can_use_varlen, choose_attention
from lora_runtime.packing import InputBuffer, PackedLayout
from lora_runtime.types import TokenSequence

LENGTHS = (3, 3, 9, 1, 5)
MASKINGS = [Masking(causal, window, scale) for causal in (False, True) for window, scale in ((None, None), (3, 0.7))]


def varlen_on_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As torch documents `varlen_attn`, one sequence after the other."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype is torch.int32
    assert cu_seq_q.diff().max() <= max_q == max_k, "a sequence is longer than the kernel was told"
    out = torch.full((*query.shape[:2], value.shape[2]), torch.nan)
    before, after = (2**31 if side < 0 else side for side in window_size)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        if start == end:
            continue
        steps = torch.arange(end - start)
        distance = steps[:, None] - steps[None, :]
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        mask = (distance <= before) & (-distance <= after)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        out[start:end] = attended.transpose(0, 1)
    return out


def step_of(spare: int | None = None) -> Step:
    rows = [Row(TokenSequence(tuple(range(n)), None)) for n in LENGTHS]
    total = sum(LENGTHS)
    into = None if spare is None else InputBuffer(PackedLayout(total + spare, len(rows) + 4), torch.device("cpu"))
    batch = Batch.pack(rows, into=into)
    return Step(batch, SlotTable(0, (), num_slots=1), ReferenceGroupedLora(RankArena(64)))


def heads_of(num_tokens: int, heads: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(num_tokens, n, 8, generator=generator) for n in (heads[0], heads[1], heads[1])]


def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking) -> torch.Tensor:
    """Each sequence alone, by the formula."""
    found, start = [], 0
    for n in LENGTHS:
        own = [t[start : start + n].transpose(0, 1).double() for t in (q, k, v)]
        keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in own[1:])
        scores = own[0] @ keys.mT * (8**-0.5 if masking.scale is None else masking.scale)
        for i in range(n):
            for j in range(n):
                if (masking.causal and j > i) or (masking.window is not None and abs(i - j) >= masking.window):
                    scores[:, i, j] = -torch.inf
        found.append((scores.softmax(-1) @ values).transpose(0, 1))
        start += n
    return torch.cat(found)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("kind", AttentionKind)
def test_sequences_attend_to_themselves_alone(
    monkeypatch: pytest.MonkeyPatch, kind: AttentionKind, heads: tuple[int, int], masking: Masking
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_on_cpu)
    q, k, v = heads_of(sum(LENGTHS), heads)
    found = attend(kind, q, k, v, step_of(), masking)
    torch.testing.assert_close(found.double(), apart(q, k, v, masking), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_a_torch_that_knows_no_groups_of_heads_gets_a_kv_head_for_each(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int]
) -> None:
    def older(query: torch.Tensor, key: torch.Tensor, *args: Any, scale: float | None, window_size: tuple[int, int]):
        assert query.shape[1] == key.shape[1]
        return varlen_on_cpu(query, key, *args, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", older)
    monkeypatch.setattr(varlen, "_TAKES_GROUPS", False)
    q, k, v = heads_of(sum(LENGTHS), heads)
    found = attend(AttentionKind.VARLEN, q, k, v, step_of(), MASKINGS[1])
    torch.testing.assert_close(found.double(), apart(q, k, v, MASKINGS[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", [AttentionKind.VARLEN, AttentionKind.MASKED])
def test_tokens_that_fill_a_buffer_up_change_nothing_and_stay_finite(
    monkeypatch: pytest.MonkeyPatch, kind: AttentionKind, masking: Masking
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_on_cpu)
    total, step = sum(LENGTHS), step_of(spare=70)
    monkeypatch.setattr(step, "batch", replace(step.batch, max_length=64))
    q, k, v = heads_of(total + 70, (4, 2))
    found = attend(kind, q, k, v, step, masking)
    want = apart(*(t[:total] for t in (q, k, v)), masking)
    torch.testing.assert_close(found[:total].double(), want, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_the_stand_in_takes_what_torch_takes() -> None:
    theirs = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(varlen_on_cpu).parameters.items():
        assert theirs[name].kind is parameter.kind
        assert parameter.default in (inspect.Parameter.empty, theirs[name].default)


@pytest.mark.parametrize(
    ("dtype", "width", "value_width", "capability", "usable"),
    [
        (torch.bfloat16, 64, 64, (8, 0), True),
        (torch.float16, 256, 256, (9, 0), True),
        (torch.float32, 64, 64, (9, 0), False),
        (torch.bfloat16, 9, 9, (9, 0), False),
        (torch.bfloat16, 264, 264, (9, 0), False),
        (torch.bfloat16, 64, 32, (9, 0), False),
        (torch.float16, 64, 64, (7, 5), False),
    ],
)
def test_what_flash_attention_cannot_do_goes_another_way(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, value_width: int, capability: Any, usable: bool
) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    query, value = (torch.zeros(1, 1, 1, w, dtype=dtype).as_subclass(OnCuda) for w in (width, value_width))
    monkeypatch.setattr(varlen, "_capability", lambda _: capability)
    assert can_use_varlen(query, value) is usable
    other = {True: AttentionKind.MASKED, False: AttentionKind.EQUAL_RUNS}
    for is_static, kind in other.items():
        assert choose_attention(query, value, is_static=is_static) is (AttentionKind.VARLEN if usable else kind)


def test_the_cpu_attends_in_runs_of_one_length() -> None:
    q, _, v = heads_of(4, (4, 4))
    assert choose_attention(q, v, is_static=False) is AttentionKind.EQUAL_RUNS


@pytest.mark.gpu
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_packed_attention_does_what_its_stand_in_does(dtype: torch.dtype, masking: Masking) -> None:
    q, k, v = (t.to("cuda", dtype) for t in heads_of(sum(LENGTHS), (4, 2)))
    rows = [Row(TokenSequence(tuple(range(n)), None)) for n in LENGTHS]
    step = Step(Batch.pack(rows, "cuda"), SlotTable(0, (), num_slots=1), ReferenceGroupedLora(RankArena(64)))
    assert can_use_varlen(q, v)
    want = apart(q.cpu(), k.cpu(), v.cpu(), masking)
    for kind in AttentionKind:
        found = attend(kind, q, k, v, step, masking).cpu().double()
        assert (found - want).norm() / want.norm() < (2e-3 if dtype is torch.float16 else 1e-2)
