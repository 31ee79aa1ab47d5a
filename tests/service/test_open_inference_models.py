"""The Open Inference Protocol's models: metadata, configuration, repository, statistics, and who may do what."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from lora_runtime.errors import InvalidRequest
from lora_runtime.types import Task
from server.pb.multilora.v1 import adapters_pb2
from server.pb.open_inference import grpc_service_pb2 as pb
from server.rpc.open_inference.dialects import dialect_for, main_dialect
from server.tenancy.model import Role
from tests.service.fake_runtime import BASE, write_adapter
from tests.service.harness import Harness, failure_of, running
from tests.service.open_inference import infer, stub_of, tensors
from tests.service.tenants import Door, guarded, make_door

DENIED, FORBIDDEN, MISSING = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
)


async def test_the_server_tells_what_it_is(server: Harness) -> None:
    stub = stub_of(server)
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    reply = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (reply.name, bool(reply.version)) == ("multilora", True)
    assert {"statistics", "model_repository", "binary_tensor_data", "parameters"} <= {*reply.extensions}


async def test_a_server_that_loads_is_live_and_not_ready(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    hold = threading.Event()
    async with running(tmp_path / "adapters", hold_base=hold) as server:
        stub = stub_of(server)
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
        failure = await failure_of(stub.ModelInfer(infer("spam", {"text_input": ["one"]})))
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        hold.set()


TENSORS = {
    "spam": (["text_input", "text_pair"], {"label": -1, "score": -1, "scores": 2, "logits": 2}),
    "people": (["text_input"], {"label": -1, "text": -1, "score": -1, "start": -1, "end": -1, "count": 1}),
    "reader": (["question", "context"], {"answer": -1, "score": -1, "start": -1, "end": -1}),
    "vectors": (["text_input", "text_pair"], {"embedding": -1}),
    "writer": (["text_input"], {"text_output": -1, "finish_reason": -1, "num_tokens": -1}),
    "base": (["text_input", "text_pair"], {"embedding": -1}),
}


@pytest.mark.parametrize("model", TENSORS)
async def test_metadata_and_configuration_agree_with_what_is_answered(tasks: Harness, model: str) -> None:
    stub, (inputs, outputs) = stub_of(tasks), TENSORS[model]
    told = await stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name=model, version="1"))).config
    asked = infer(model, {spec.name: ["a b"] for spec in config.input if not spec.optional})
    answer = await stub.ModelInfer(asked)

    assert (told.name, [*told.versions], told.platform) == (model, ["1"], "multilora")
    assert [(spec.name, spec.datatype, [*spec.shape]) for spec in told.inputs] == [
        (name, "BYTES", [-1, 1]) for name in inputs
    ]
    assert {spec.name: spec.shape[1] for spec in told.outputs} == outputs
    assert [(o.name, o.datatype) for o in answer.outputs] == [(o.name, o.datatype) for o in told.outputs]
    assert all(spec.shape[1] in (-1, o.shape[1]) for spec, o in zip(told.outputs, answer.outputs, strict=True))
    assert (config.name, config.max_batch_size, config.WhichOneof("scheduling_choice")) == (
        model,
        8,
        "dynamic_batching",
    )
    assert [(spec.name, [*spec.dims]) for spec in config.input] == [(name, [1]) for name in inputs]
    assert [spec.name for spec in config.input if spec.optional] == [n for n in inputs if n == "text_pair"]
    assert {spec.name: spec.dims[0] for spec in config.output} == outputs
    assert config.model_transaction_policy.decoupled == (model == "writer")


async def test_labels_are_told_in_the_order_of_scores(server: Harness) -> None:
    config = (await stub_of(server).ModelConfig(pb.ModelConfigRequest(name="topics"))).config
    assert json.loads(config.parameters["labels"].string_value) == ["art", "law", "sport", "tech"]
    assert config.parameters["task"].string_value == "classify"


def test_a_base_that_generates_is_a_model_that_does_and_embeds_when_asked() -> None:
    assert BASE.card is not None
    card = replace(BASE.card, second_task=Task.GENERATE)
    assert main_dialect(card).task is dialect_for(card, ()).task is Task.GENERATE
    assert dialect_for(card, ("embedding",)).task is Task.EMBED
    for mixed in (("embedding", "text_output"), ("text_output", "embedding")):
        with pytest.raises(InvalidRequest) as caught:
            dialect_for(card, mixed)
        assert caught.value.field == "outputs.embedding"


async def test_a_server_that_drains_is_not_ready(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "spam", labels=["ham", "spam"])
    async with running(tmp_path / "root", drain_delay=0.5) as server:
        stub = stub_of(server)
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        server.stop.set()
        async with asyncio.timeout(5):
            while (await stub.ServerReady(pb.ServerReadyRequest())).ready:
                await asyncio.sleep(0.01)
        assert tensors(await stub.ModelInfer(infer("spam", {"text_input": ["one"]})))["label"]


async def test_a_template_s_fields_are_tensors(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "qa", task="generate", prompt={"template": "{question} in {context}?"})
    async with running(tmp_path / "root") as server:
        stub = stub_of(server)
        told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="qa"))
        assert [spec.name for spec in told.inputs] == ["context", "question"]
        both = await stub.ModelInfer(infer("qa", {"question": ["a"], "context": ["b"]}))
        plain = await stub.ModelInfer(infer("qa", {"text_input": ["as it is"]}))
        missing = await failure_of(stub.ModelInfer(infer("qa", {"question": ["a"]})))
        mixed = await failure_of(stub.ModelInfer(infer("qa", {"question": ["a"], "text_input": ["b"]})))
        long = await failure_of(stub.ModelInfer(infer("qa", {"question": ["a"], "context": ["b" * 70]})))
    assert tensors(both)["text_output"] == [["a in b?"]]
    assert tensors(plain)["text_output"] == [["as it is"]]
    assert (missing.field, mixed.field, long.field) == ("inputs", "inputs.text_input", "inputs.*[0]")


async def test_wrong_names_are_told_by_the_protocol_s_fields(server: Harness) -> None:
    stub = stub_of(server)
    for call, request in (
        (stub.ModelReady, pb.ModelReadyRequest),
        (stub.ModelMetadata, pb.ModelMetadataRequest),
        (stub.ModelConfig, pb.ModelConfigRequest),
        (stub.ModelStatistics, pb.ModelStatisticsRequest),
    ):
        assert (await failure_of(call(request(name="../spam")))).field == "name"
        assert (await failure_of(call(request(name="spam", version="x@")))).field == "version"
    for name in ("absent", "spam@7", "spam@prod"):
        for call, request in ((stub.ModelMetadata, pb.ModelMetadataRequest), (stub.ModelConfig, pb.ModelConfigRequest)):
            assert (await failure_of(call(request(name=name)))).code is MISSING
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name=name))).ready
    assert (await failure_of(stub.ModelMetadata(pb.ModelMetadataRequest()))).field == "name"
    wrong = pb.RepositoryIndexRequest(repository_name="../x")
    assert (await failure_of(stub.RepositoryIndex(wrong))).field == "repository_name"


async def index(stub: Any, **fields: Any) -> dict[tuple[str, str], tuple[str, str]]:
    reply = await stub.RepositoryIndex(pb.RepositoryIndexRequest(**fields))
    return {(model.name, model.version): (model.state, model.reason) for model in reply.models}


async def ready(stub: Any, name: str) -> bool:
    return (await stub.ModelReady(pb.ModelReadyRequest(name=name))).ready


async def test_models_are_loaded_and_unloaded(server: Harness) -> None:
    stub = stub_of(server)
    before = await index(stub)
    assert before["base", "1"] == ("READY", "")
    assert before["spam", "1"] == ("UNAVAILABLE", "not loaded; its first request loads it")
    assert before["garbled", "1"][0] == "UNAVAILABLE" and "not valid JSON" in before["garbled", "1"][1]
    assert not await ready(stub, "spam")

    loaded = await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="spam"))
    assert (loaded.model_name, loaded.is_loaded) == ("spam", True)
    assert await ready(stub, "spam")
    assert {*await index(stub, ready=True)} == {("base", "1"), ("spam", "1")}

    request = pb.RepositoryModelUnloadRequest(model_name="spam")
    request.parameters["unload_dependents"].bool_param = False
    assert (await stub.RepositoryModelUnload(request)).is_unloaded
    assert not await ready(stub, "spam")
    assert {*await index(stub, ready=True)} == {("base", "1")}


async def test_kserve_s_layout_is_understood(server: Harness) -> None:
    """Its messages have the name in field 1, and the answer's in 1 and 2."""
    service = "/inference.GRPCInferenceService/RepositoryModel"
    kserve = b"\x0a\x04spam"
    assert await server.channel.unary_unary(f"{service}Load")(kserve) == b"\x0a\x04spam\x10\x01"
    assert await ready(stub_of(server), "spam")
    assert await server.channel.unary_unary(f"{service}Unload")(kserve) == b"\x0a\x04spam\x10\x01"
    assert not await ready(stub_of(server), "spam")


async def test_a_load_takes_no_files_and_names_what_is_wrong(server: Harness) -> None:
    stub = stub_of(server)
    for name, value in (("config", {"string_param": "{}"}), ("file:1/model.bin", {"bytes_param": b"x"})):
        request = pb.RepositoryModelLoadRequest(model_name="spam")
        request.parameters[name].CopyFrom(pb.ModelRepositoryParameter(**value))  # pyright: ignore
        failure = await failure_of(stub.RepositoryModelLoad(request))
        assert (failure.code, failure.field) == (grpc.StatusCode.INVALID_ARGUMENT, f"parameters.{name}")
    cases = [
        ({"model_name": ""}, "model_name"),
        ({"model_name": "spam", "repository_name": "a/b"}, "repository_name"),
        ({"model_name": "other/spam", "repository_name": "default"}, "repository_name"),
        ({"model_name": "../spam"}, "model_name"),
    ]
    for fields, field in cases:
        for call, request in (
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest),
            (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest),
        ):
            assert (await failure_of(call(request(**fields)))).field == field
    broken = await failure_of(stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nan")))
    base = await failure_of(stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="base")))
    assert (broken.code, base.field) == (grpc.StatusCode.FAILED_PRECONDITION, "model_name")
    assert not await ready(stub, "spam")


async def test_aliases_are_versions_of_a_model(tmp_path: Path) -> None:
    for version in ("1", "2"):
        write_adapter(tmp_path / "root" / "news" / version, labels=["a", "b"])
    async with running(tmp_path / "root") as server:
        stub = stub_of(server)
        await server.adapters.SetAlias(adapters_pb2.SetAliasRequest(adapter="news", alias="prod", version=2))
        answered = {
            (model, version): (
                await stub.ModelInfer(infer(model, {"text_input": ["x"]}, version=version))
            ).model_version
            for model, version in (("news", ""), ("news@prod", ""), ("news", "prod"), ("news", "2"))
        }
        told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="news@prod"))
        every = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="news"))
        one = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="news", version="prod"))
    assert [*answered.values()] == ["1", "2", "2", "2"]
    assert (told.name, [*told.versions]) == ("news", ["1", "2"])
    assert [(entry.version, entry.execution_count) for entry in every.model_stats] == [("1", 1), ("2", 3)]
    assert [(entry.version, entry.execution_count) for entry in one.model_stats] == [("2", 3)]


async def test_a_load_generator_s_calls_in_their_order(server: Harness) -> None:
    """What perf_analyzer asks: it looks statistics up by the metadata's name, and by the highest integer version."""
    stub = stub_of(server)
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert "statistics" in (await stub.ServerMetadata(pb.ServerMetadataRequest())).extensions
    told = await stub.ModelMetadata(pb.ModelMetadataRequest(name="topics"))
    config = (await stub.ModelConfig(pb.ModelConfigRequest(name="topics"))).config
    optional = {spec.name for spec in config.input if spec.optional}
    before = await statistics(stub, told.name)

    request = pb.ModelInferRequest(model_name="topics", id="0")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for spec in told.inputs:
        if spec.name not in optional:
            shape = [3 if size == -1 else size for size in spec.shape]
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
            request.raw_input_contents.append(b"\x01\x00\x00\x00x" * 3)
    for spec in told.outputs:
        request.outputs.add(name=spec.name)
    for _ in range(4):
        assert (await stub.ModelInfer(request)).id == "0"
    await failure_of(stub.ModelInfer(infer("topics", {"text_input": ["w " * 40]})))  # refused: counts for nobody
    after = await statistics(stub, told.name)

    assert int(after.version) == 1
    assert (after.inference_count - before.inference_count, after.execution_count - before.execution_count) == (12, 4)
    took = after.inference_stats
    assert (took.success.count, took.queue.count, took.compute_infer.count, took.fail.count) == (4, 4, 4, 0)
    assert took.success.ns == took.queue.ns + took.compute_infer.ns
    assert took.queue.ns == 4_000_000  # the fake waits 1 ms each
    assert 0 < took.compute_infer.ns <= 8_000_000


async def statistics(stub: Any, name: str) -> pb.ModelStatistics:
    (entry,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name=name))).model_stats
    assert entry.name == name
    return entry


async def test_statistics_of_all_models_have_those_that_nobody_asked(server: Harness) -> None:
    reply = await stub_of(server).ModelStatistics(pb.ModelStatisticsRequest())
    assert {entry.name for entry in reply.model_stats} >= {"base", "spam", "topics", "short", "nan"}
    assert all(entry.execution_count == 0 for entry in reply.model_stats)


@pytest.mark.parametrize(
    "method", ["SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings"]
)
async def test_other_methods_are_unimplemented(server: Harness, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


KEYS = (
    ("infer", "acme", (Role.INFER,)),
    ("adapters", "acme", (Role.ADAPTERS,)),
    ("rival", "rival", (Role.INFER, Role.ADAPTERS)),
    ("operator", "default", (Role.OPERATOR,)),
)


@pytest.fixture
def site(tmp_path: Path) -> tuple[Path, Door]:
    write_adapter(tmp_path / "root" / "acme" / "news" / "1", labels=["a", "b"])
    write_adapter(tmp_path / "root" / "default" / "spam" / "1", labels=["a", "b"])
    return tmp_path / "root", make_door(tmp_path / "door")


async def test_rights_are_those_of_our_own_services(site: tuple[Path, Door]) -> None:
    calls = {
        "ModelInfer": infer("acme/news", {"text_input": ["x"]}),
        "ModelReady": pb.ModelReadyRequest(name="acme/news"),
        "ModelMetadata": pb.ModelMetadataRequest(name="acme/news"),
        "ModelConfig": pb.ModelConfigRequest(name="acme/news"),
        "ModelStatistics": pb.ModelStatisticsRequest(name="acme/news"),
        "RepositoryIndex": pb.RepositoryIndexRequest(repository_name="acme"),
        "RepositoryModelLoad": pb.RepositoryModelLoadRequest(model_name="acme/news"),
        "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(repository_name="acme", model_name="news"),
    }
    expected = {
        "infer": {"RepositoryModelLoad": FORBIDDEN, "RepositoryModelUnload": FORBIDDEN},
        "adapters": {"ModelInfer": FORBIDDEN},
        "rival": dict.fromkeys(calls, MISSING) | {"ModelReady": None, "RepositoryIndex": FORBIDDEN},
        "operator": {},
    }
    async with guarded(*site, KEYS) as (server, callers):
        stub = stub_of(server)
        for method, request in [*calls.items(), ("ServerLive", pb.ServerLiveRequest())]:
            assert (await failure_of(getattr(stub, method)(request))).code is DENIED, method
        for who, codes in expected.items():
            for method, request in calls.items():
                call = getattr(stub, method)(request, metadata=callers[who].metadata)
                if code := codes.get(method):
                    assert (await failure_of(call)).code is code, (who, method)
                else:
                    await call


async def test_names_and_statistics_are_the_caller_s(site: tuple[Path, Door]) -> None:
    async with guarded(*site, KEYS) as (server, callers):
        stub = stub_of(server)
        mine, boss = callers["infer"].metadata, callers["operator"].metadata
        reply = await stub.ModelInfer(infer("news", {"text_input": ["x", "y"]}), metadata=mine)
        listed = await stub.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=mine)
        every = await stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="-"), metadata=boss)
        hidden = await stub.ModelReady(pb.ModelReadyRequest(name="acme/news"), metadata=callers["rival"].metadata)
        asked = pb.ModelStatisticsRequest(name="acme/news")
        await stub.ModelInfer(infer("acme/news", {"text_input": ["x"]}), metadata=boss)
        own = (await stub.ModelStatistics(asked, metadata=mine)).model_stats[0]
        total = (await stub.ModelStatistics(asked, metadata=boss)).model_stats[0]
    assert reply.model_name == "acme/news"
    assert [model.name for model in listed.models] == ["base", "acme/news"]
    assert [model.name for model in every.models] == ["base", "acme/news", "spam"]
    assert not hidden.ready
    assert (own.name, own.inference_count, total.inference_count) == ("acme/news", 2, 3)


async def test_limits_and_charges_are_the_tenant_s(site: tuple[Path, Door]) -> None:
    root, door = site
    door.write("[tenants.acme]\nmax_queued_sequences = 2", "[tenants.rival]\nrequests_per_second = 1")
    async with guarded(root, door, KEYS) as (server, callers):
        stub = stub_of(server)
        mine = callers["infer"].metadata
        full = await failure_of(stub.ModelInfer(infer("news", {"text_input": ["x"] * 3}), metadata=mine))
        await stub.ModelInfer(infer("base", {"text_input": ["x"]}), metadata=callers["rival"].metadata)
        fast = await failure_of(
            stub.ModelInfer(infer("base", {"text_input": ["x"]}), metadata=callers["rival"].metadata)
        )
        assert full.code is fast.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert full.quota is not None and "max_queued_sequences" in full.quota[1]
        assert fast.quota is not None and "requests_per_second" in fast.quota[1] and fast.retry_after_s
        assert server.app._admission.num_sequences == 0


async def test_a_load_is_in_the_audit_log(site: tuple[Path, Door], tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with guarded(*site, KEYS, audit_log=str(log)) as (server, callers):
        stub, request = stub_of(server), pb.RepositoryModelLoadRequest(model_name="news")
        await stub.RepositoryModelLoad(request, metadata=callers["adapters"].metadata)
        await failure_of(stub.RepositoryModelLoad(request, metadata=callers["infer"].metadata))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    loads = [entry for entry in entries if "RepositoryModelLoad" in json.dumps(entry)]
    assert len(loads) == 2
    assert "tenants/acme/adapters/news" in json.dumps(loads[0]) and "PERMISSION_DENIED" in json.dumps(loads[1])
