"""Embed, as a client sees it. The fake's vector is (tokens, sum of ids % 11, which pooling), not normalised."""

from __future__ import annotations

import math

import grpc
import pytest

from server.pb.multilora.v1 import adapters_pb2, common_pb2, inference_pb2
from tests.service.fake_runtime import BASE
from tests.service.harness import Harness, embed_request, failure_of

MEAN, CLS, LAST = common_pb2.POOLING_MEAN, common_pb2.POOLING_CLS, common_pb2.POOLING_LAST


async def test_each_text_becomes_a_vector_as_the_adapter_says(tasks: Harness) -> None:
    reply = await tasks.inference.Embed(embed_request("vectors", "c d", ""))
    assert (reply.dimension, reply.pooling, reply.normalize) == (3, CLS, True)
    length = math.hypot(4, (99 + 100) % 11, 1)
    assert list(reply.results[0].values) == pytest.approx([4 / length, 1 / length, 1 / length])
    assert list(reply.results[1].values) == pytest.approx([2 / math.hypot(2, 1), 0, 1 / math.hypot(2, 1)])
    assert [(result.num_tokens, result.truncated) for result in reply.results] == [(4, False), (2, False)]


async def test_the_base_model_answers_without_an_adapter(tasks: Harness) -> None:
    for reference in ("base", "base@1", "tenants/default/adapters/base"):
        reply = await tasks.inference.Embed(embed_request(reference, "c d"))
        assert reply.adapter == "tenants/default/adapters/base/versions/1"
        assert (reply.digest, reply.pooling, reply.normalize) == (BASE.digest, MEAN, False)
        assert list(reply.results[0].values) == [4, 1, 0]


@pytest.mark.parametrize(("pooling", "index"), [(MEAN, 0), (CLS, 1), (LAST, 2)])
@pytest.mark.parametrize("adapter", ["vectors", "base"])
async def test_a_request_chooses_its_own_pooling_and_length(
    tasks: Harness, adapter: str, pooling: common_pb2.Pooling.ValueType, index: int
) -> None:
    request = embed_request(adapter, "c d", pooling=pooling, normalize=False)
    reply = await tasks.inference.Embed(request)
    assert (reply.pooling, reply.normalize) == (pooling, False)
    assert list(reply.results[0].values) == [4, 1, index]
    request.normalize = True
    reply = await tasks.inference.Embed(request)
    assert reply.normalize
    assert math.hypot(*reply.results[0].values) == pytest.approx(1)


async def test_a_pair_is_one_input(tasks: Harness) -> None:
    pair = inference_pb2.TextInput(text="c", text_pair="d c")
    reply = await tasks.inference.Embed(inference_pb2.EmbedRequest(adapter="base", inputs=[pair]))
    assert [result.num_tokens for result in reply.results] == [5]


async def test_an_adapters_own_tokenizer_and_length_apply(tasks: Harness) -> None:
    reply = await tasks.inference.Embed(embed_request("spelled", "abc"))
    assert reply.results[0].num_tokens == 5
    request = embed_request("spelled", "abcde")
    failure = await failure_of(tasks.inference.Embed(request))
    assert (failure.field, failure.info.metadata["limit"]) == ("inputs[0].text", "6")


async def test_an_unknown_pooling_is_named(tasks: Harness) -> None:
    failure = await failure_of(tasks.inference.Embed(embed_request("vectors", "c", pooling=9)))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "pooling")


async def test_what_an_adapter_embeds_with_is_described(tasks: Harness) -> None:
    async def get(name: str) -> adapters_pb2.Adapter:
        return (await tasks.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(adapter=name))).adapter

    vectors, spelled, spam = [await get(name) for name in ("vectors", "spelled", "spam")]
    assert (vectors.task, vectors.pooling, vectors.normalize) == (common_pb2.TASK_EMBED, CLS, True)
    assert (spelled.pooling, spelled.normalize) == (MEAN, False)
    assert spam.pooling == common_pb2.POOLING_UNSPECIFIED
    assert [adapter.own_tokenizer for adapter in (vectors, spelled, spam)] == [False, True, False]


async def test_the_base_is_always_resident_and_stays(tasks: Harness) -> None:
    get = adapters_pb2.GetAdapterRequest(adapter="base")
    load = adapters_pb2.LoadAdapterRequest(adapter="base", wait=True)
    for adapter in (
        (await tasks.adapters.GetAdapter(get)).adapter,
        (await tasks.adapters.LoadAdapter(load)).adapter,
    ):
        assert (adapter.state, adapter.task) == (adapters_pb2.ADAPTER_STATE_READY, common_pb2.TASK_EMBED)
    failure = await failure_of(tasks.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(adapter="base")))
    assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, "adapter")
    page = await tasks.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    assert not [adapter.name for adapter in page.adapters if "/base/" in adapter.name]
