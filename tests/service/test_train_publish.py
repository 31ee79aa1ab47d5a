"""`multilora train … --publish`: a trained adapter goes to a live server, and answers there as PEFT does."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lora_runtime.errors import InvalidRequest
from lora_runtime.train.settings import TrainSettings
from server.cli import app
from server.cli_train import train_app
from server.control_cli.given import given
from server.pb.multilora.v1 import adapters_pb2
from server.train_cli.publishing import Publication, publish_options
from tests.oracle import PeftOracle, make_adapter
from tests.service.fake_runtime import write_adapter
from tests.service.harness import classify_request, running
from tests.svd_models import make_pair
from tests.training import make_bases, peft_logits, topics

TEXTS = ["a red cat", "gold and iron", "the blue horse ran", "yellow", "zinc dog"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bases(tmp_path_factory.mktemp("bases"))["bert"]


@pytest.fixture
def settings(tmp_path: Path, base: str) -> TrainSettings:
    return topics(tmp_path, base)


def train(settings: TrainSettings, *arguments: str) -> Result:
    rows = "--train", str(settings.data.train), "--valid", str(settings.data.valid), "--max-length", "16"
    run = "--out", str(settings.run.out), "--learning-rate", "2e-2", "--epochs", "2", "--threads", "1", "--no-report"
    form = "--rank", "4", "--dropout", "0"
    return CliRunner().invoke(train_app, ["classify", "--base", settings.base, *rows, *run, *form, *arguments])


def logits_of(reply: Any) -> torch.Tensor:
    return torch.tensor([list(result.logits) for result in reply.results])


async def test_a_trained_adapter_is_published_beside_one_that_is_served_and_answers_as_peft(
    settings: TrainSettings, base: str, tmp_path: Path
) -> None:
    root = tmp_path / "served"
    make_adapter(Path(base), root / "other", num_labels=2)
    expected = torch.stack([PeftOracle(Path(base), root / "other", 2).logits(text) for text in TEXTS])
    async with running(root, base=base, real=True, threads=1, state=tmp_path / "state") as server:
        await server.adapters.LoadAdapter(adapters_pb2.LoadAdapterRequest(adapter="other", wait=True))
        answering, stop = list[torch.Tensor](), asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                reply = await server.inference.Classify(classify_request("other", *TEXTS, return_logits=True))
                answering.append(logits_of(reply))

        asking = asyncio.create_task(ask())
        address = f"127.0.0.1:{server.app.port}"
        arguments = "--publish", "default/topics@prod", "--server", address
        done = await asyncio.to_thread(train, settings, *arguments)
        stop.set()
        await asking
        assert done.exit_code == 0, done.output
        assert f"published topics@1 to {address}" in done.output
        assert "topics@1 is ready" in done.output
        assert "topics@prod leads to version 1" in done.output
        assert len(answering) > 1
        for found in answering:  # the one that was served went on to answer
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        shown = await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(adapter="topics"))
        assert shown.adapter.state == adapters_pb2.ADAPTER_STATE_READY
        names = ["topics@prod", "other"] * 3
        requests = [classify_request(name, *TEXTS, return_logits=True) for name in names]
        replies = await asyncio.gather(*(server.inference.Classify(request) for request in requests))
        wanted = {"topics@prod": peft_logits(settings, 3, TEXTS), "other": expected}
        for name, reply in zip(names, replies, strict=True):
            torch.testing.assert_close(logits_of(reply), wanted[name], atol=1e-4, rtol=1e-4)
        assert list(replies[0].labels) == ["animals", "colours", "metals"]
        num_adapters, num_batches = [await server.sample(f"multilora_batch_adapters_{end}") for end in ("sum", "count")]
        assert num_adapters > num_batches  # some batch held both
        await check_refusal(settings, address)


async def check_refusal(settings: TrainSettings, address: str) -> None:
    """An adapter that says that it is of another base is refused, and stays where it was written."""
    file = settings.run.out / "multilora.json"
    content = json.loads(file.read_text())
    content["base"]["weights_sha256"] = "ab" * 32
    file.write_text(json.dumps(content))
    publication = publish_options("topics@prod", address)
    assert publication is not None
    code, told = await asyncio.to_thread(publish, publication, settings.run.out)
    assert code == 1
    assert "multilora.json field base: " in told
    assert f"the adapter stays in {settings.run.out}; when that is mended, publish it:" in told
    assert f"multilora adapters upload topics {settings.run.out} --load --server {address}" in told


async def test_one_that_is_registered_and_does_not_load_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    folder = write_adapter(tmp_path / "topics", labels=["no", "yes"], weights="broken")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    async with running(tmp_path / "served", state=tmp_path / "state") as server:
        address = f"127.0.0.1:{server.app.port}"
        publication = publish_options("topics@prod", address)
        assert publication is not None
        code, told = await asyncio.to_thread(publish, publication, folder)
    assert code == 1
    assert f"the adapter stays in {folder}, and the server has it as topics@1; when that is mended:" in told
    assert f"multilora adapters load topics@1 --server {address}" in told
    assert f"multilora adapters alias topics prod 1 --server {address}" in told


def publish(publication: Publication, folder: Path) -> tuple[int, str]:
    """The exit code, and what it says."""
    import typer

    app = typer.Typer()

    @app.command()
    def command() -> None:
        publication.publish("train", folder)

    done = CliRunner().invoke(app, [])
    return done.exit_code, done.output


def test_without_a_server_the_adapter_stays_and_the_way_to_publish_it_is_told(tmp_path: Path, base: str) -> None:
    folder = make_adapter(Path(base), tmp_path / "topics")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, and nobody listens
        publication = publish_options("acme/topics@prod", address, publish_timeout=5.0)
        assert publication is not None
        code, told = publish(publication, folder)
    assert code == 1
    assert f"multilora train: cannot reach {address}" in told
    assert f"the adapter stays in {folder}; when that is mended, publish it:" in told
    assert f"multilora adapters upload acme/topics {folder} --load --server {address}" in told
    assert f"multilora adapters alias acme/topics prod VERSION --server {address}" in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_credentials_are_those_of_the_other_commands(tmp_path: Path, base: str) -> None:
    folder = make_adapter(Path(base), tmp_path / "topics")
    publication = publish_options("topics", tls=True, tls_cert=tmp_path / "cert.pem")
    assert publication is not None
    code, told = publish(publication, folder)
    assert code == 1
    assert "--tls-cert and --tls-key go together" in told
    assert given.get() is None or given.get() == publication.credentials


@pytest.mark.parametrize("name", ["topics@3", "a b", "acme/topics@", "tenants/acme/adapters/topics", "../topics", ""])
def test_a_name_that_cannot_be_published_is_refused_before_training(settings: TrainSettings, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        publish_options(name)
    assert caught.value.field == "publish"
    done = train(settings, "--publish", name)
    assert done.exit_code == 1
    assert "publish:" in done.output
    assert not settings.run.out.exists()


async def test_an_extracted_adapter_is_published_too(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "models", "bert")
    (tmp_path / "served").mkdir()
    async with running(
        tmp_path / "served", base=str(pair.base), real=True, threads=1, state=tmp_path / "state"
    ) as server:
        address = f"127.0.0.1:{server.app.port}"
        models = "--base", str(pair.base), "--tuned", str(pair.tuned), "--out", str(tmp_path / "adapter")
        arguments = ["extract", *models, "--rank", "4", "--publish", "small", "--server", address]
        done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert done.exit_code == 0, done.output
        reply = await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(adapter="small"))
        assert reply.adapter.state == adapters_pb2.ADAPTER_STATE_READY
    refused = CliRunner().invoke(app, [*arguments[:-4], "--publish", "small@2"])
    assert refused.exit_code == 1
    assert "publish: 'small@2' names a version" in refused.output
