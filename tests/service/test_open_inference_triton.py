"""Triton's own client against the server: every method it has for us, with the answers of our own API."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from tests.service.harness import Harness, classify_request, embed_request, question_request, tokens_request

# an interpreter that has `tritonclient[grpc]`, where this one has it not
PYTHON = os.environ.get("MULTILORA_TRITON_PYTHON") or (
    sys.executable if importlib.util.find_spec("tritonclient") else ""
)
TEXTS = ("free prize", "see you at noon")

pytestmark = pytest.mark.skipif(
    not PYTHON, reason="needs tritonclient[grpc]: install it, or name an interpreter in MULTILORA_TRITON_PYTHON"
)


async def test_triton_s_client_gets_what_our_own_clients_get(tasks: Harness) -> None:
    script = Path(__file__).with_name("triton_client.py")
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, str(script), str(tasks.app.port)), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    found = json.loads(out)

    about, repository = found["about"], found["repository"]
    assert about["live"] and about["ready"] and about["server"]["name"] == "multilora"
    assert [spec["name"] for spec in about["metadata"]["inputs"]] == ["text_input", "text_pair"]
    assert about["config"]["model_transaction_policy"]["decoupled"] and about["config"]["max_batch_size"] == 8
    assert about["config"]["input"] == [{"name": "text_input", "data_type": "TYPE_STRING", "dims": ["1"]}]
    assert [repository[name] for name in ("before", "loaded", "unloaded")] == [False, True, False]
    assert {"name": "base", "version": "1", "state": "READY"} in repository["index"]
    assert repository["refused"][0] == "StatusCode.INVALID_ARGUMENT"

    await check_inference(tasks, found["inference"])
    stream = found["stream"]
    assert "absent" in stream["error"]
    assert stream["text"] == "abcdef"
    assert stream["end"] == {"finish_reason": [["eos"]], "num_tokens": [[7]]}
    (statistics,) = found["statistics"]
    assert (statistics["version"], statistics["inference_count"]) == ("1", "6")


async def check_inference(tasks: Harness, found: dict) -> None:
    own = (await tasks.inference.Classify(classify_request("spam", *TEXTS, return_logits=True))).results
    assert found["classes"]["label"] == [[result.scores[0].label] for result in own]
    assert found["classes"]["logits"] == [[*result.logits] for result in own]
    assert [row[0].rsplit(":", 1)[1] for row in found["ranked"]["scores"]] == [result.scores[0].label for result in own]
    assert found["async"]["id"] == "async"
    assert [max(row) for row in found["async"]["scores"]] == [result.scores[0].score for result in own]
    asked = question_request("reader", ("who", "anna met bob in rome"), top_k=2)
    answers = (await tasks.inference.AnswerQuestion(asked)).results[0].answers
    for name in ("score", "start", "end"):
        assert found["answer"][name] == [[getattr(answer, name) for answer in answers]]
    assert found["answer"]["answer"] == [[answer.text for answer in answers]]
    vectors = (await tasks.inference.Embed(embed_request("vectors", *TEXTS))).results
    assert found["embedding"]["embedding"] == [[*result.values] for result in vectors]
    labelled = (await tasks.inference.ClassifyTokens(tokens_request("people", *TEXTS))).results
    assert found["tokens"]["count"] == [[len(result.spans)] for result in labelled]
    for row, result in zip(found["tokens"]["text"], labelled, strict=True):
        assert row[: len(result.spans)] == [span.text for span in result.spans]
    assert found["text"] == {"text_output": [["fre"], ["see"]], "num_tokens": [[3], [3]]}
    assert found["absent"][0] == "StatusCode.NOT_FOUND"
    assert found["wrong"][0] == "StatusCode.INVALID_ARGUMENT" and "top_k" in found["wrong"][1]
