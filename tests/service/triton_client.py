"""What Triton's own client makes of a server, as JSON: `python triton_client.py PORT`, in a process of its own.

Its messages have the names of ours, so that both cannot be in one process.
"""

from __future__ import annotations

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

TEXTS = ["free prize", "see you at noon"]


def tensor(name: str, texts: list[str]) -> triton.InferInput:
    data = np.array([[text.encode()] for text in texts], dtype=np.object_)
    given = triton.InferInput(name, list(data.shape), "BYTES")
    given.set_data_from_numpy(data)
    return given


def values(result: triton.InferResult, *names: str) -> dict[str, Any]:
    return {name: [[plain(value) for value in row] for row in result.as_numpy(name)] for name in names}


def plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value.item()


def about(client: triton.InferenceServerClient) -> dict[str, Any]:
    config = client.get_model_config("writer", as_json=True)["config"]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("spam", as_json=True),
        "config": config,
    }


def repository(client: triton.InferenceServerClient) -> dict[str, Any]:
    found: dict[str, Any] = {"before": client.is_model_ready("spam")}
    client.load_model("spam")
    found["loaded"] = client.is_model_ready("spam", "1")
    client.unload_model("spam")
    found["unloaded"] = client.is_model_ready("spam")
    found["index"] = client.get_model_repository_index(as_json=True)["models"]
    found["refused"] = error_of(lambda: client.load_model("spam", config="{}"))
    return found


def inference(client: triton.InferenceServerClient) -> dict[str, Any]:
    inputs = [tensor("text_input", TEXTS)]
    outputs = [triton.InferRequestedOutput(name) for name in ("label", "logits")]
    ranked = [triton.InferRequestedOutput("scores", class_count=2)]
    answered: queue.Queue[Any] = queue.Queue()
    client.async_infer("spam", inputs, lambda result, error: answered.put((result, error)), request_id="async")
    result, error = answered.get(timeout=30)
    assert error is None, error
    qa = [tensor("question", ["who"]), tensor("context", ["anna met bob in rome"])]
    settings = {"max_new_tokens": 3, "temperature": "0"}
    return {
        "classes": values(client.infer("spam", inputs, outputs=outputs), "label", "logits"),
        "ranked": values(client.infer("spam", inputs, outputs=ranked), "scores"),
        "async": {"id": result.get_response().id, **values(result, "scores")},
        "answer": values(client.infer("reader", qa, parameters={"top_k": 2}), "answer", "score", "start", "end"),
        "embedding": values(client.infer("vectors", inputs), "embedding"),
        "tokens": values(client.infer("people", inputs), "label", "text", "score", "count"),
        "text": values(client.infer("writer", inputs, parameters=settings), "text_output", "num_tokens"),
        "absent": error_of(lambda: client.infer("absent", inputs)),
        "wrong": error_of(lambda: client.infer("spam", inputs, parameters={"top_k": 0})),
    }


def streaming(client: triton.InferenceServerClient) -> dict[str, Any]:
    """One request that fails, and one that generates; until the final response of that."""
    answered: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answered.put((result, error)))
    client.async_stream_infer("absent", [tensor("text_input", ["x"])], request_id="bad")
    _, error = answered.get(timeout=30)
    client.async_stream_infer(
        "writer", [tensor("text_input", ["abcdef"])], request_id="good", enable_empty_final_response=True
    )
    pieces: list[str] = []
    while True:
        result, failed = answered.get(timeout=30)
        assert failed is None, failed
        pieces.append(values(result, "text_output")["text_output"][0][0])
        if result.get_response().parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    return {"error": error.message(), "text": "".join(pieces), "end": values(result, "finish_reason", "num_tokens")}


def error_of(call: Any) -> list[Any]:
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return []


def main() -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}") as client:
        found = {"about": about(client), "repository": repository(client), "inference": inference(client)}
        found["stream"] = streaming(client)
        found["statistics"] = client.get_inference_statistics("spam", as_json=True)["model_stats"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
