"""GENERATE: prompts, or the fields of an adapter's prompt template, to texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from google.protobuf.message import Message

from lora_runtime.types import AdapterCard, Task
from server.pb.multilora.v1 import inference_pb2
from server.rpc.generate import GENERATE
from server.rpc.open_inference.dialect import Dialect, InputSpec, OutputSpec, Texts, check_inputs, fields_in
from server.rpc.open_inference.tensors import Tensor
from server.rpc.prompts import fields_of, templated

PROMPT = "text_input"
TEXT = "text_output"
_PREFIX = "FINISH_REASON_"
# log-probabilities have no tensor
_SAMPLING = tuple(name for name in inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name if name != "logprobs")


def prompt_inputs(card: AdapterCard) -> tuple[InputSpec, ...]:
    """The fields of the adapter's template, else the prompt itself."""
    spec = templated(card)
    names = [PROMPT] if spec is None else sorted(fields_of(spec))
    return tuple(map(InputSpec, names))


def outputs(_card: AdapterCard) -> tuple[OutputSpec, ...]:
    return OutputSpec(TEXT, "BYTES"), OutputSpec("finish_reason", "BYTES"), OutputSpec("num_tokens", "INT32")


def build(texts: Texts, card: AdapterCard) -> inference_pb2.GenerateRequest:
    """A prompt alone is taken as it is, where the adapter has a template too; raises InvalidRequest on `inputs`."""
    spec = templated(card)
    fields = frozenset[str]() if spec is None else fields_of(spec)
    if not fields or ([*texts] == [PROMPT] and PROMPT not in fields):
        check_inputs(texts, (InputSpec(PROMPT),))
        prompts = [inference_pb2.PromptInput(text=text) for text in texts[PROMPT]]
    else:
        check_inputs(texts, prompt_inputs(card))
        rows = zip(*texts.values(), strict=True)
        prompts = [inference_pb2.PromptInput(fields=dict(zip(texts, row, strict=True))) for row in rows]
    return inference_pb2.GenerateRequest(inputs=prompts)


def targets(request: inference_pb2.GenerateRequest) -> Mapping[str, Message]:
    return {
        **fields_in(request.sampling, *_SAMPLING),
        **fields_in(request.constraint, "json_schema", "regex"),
    }


def ends(
    samples: Iterable[Iterable[inference_pb2.GeneratedSample]] | Iterable[Iterable[inference_pb2.SampleEnd]],
) -> dict[str, Tensor]:
    """How the samples of each prompt ended."""
    rows = [[*row] for row in samples]
    return {
        "finish_reason": Tensor("BYTES", [[_reason(sample.finish_reason) for sample in row] for row in rows]),
        "num_tokens": Tensor("INT32", [[sample.num_tokens for sample in row] for row in rows]),
    }


def _tensors(_request: inference_pb2.GenerateRequest, reply: inference_pb2.GenerateResponse) -> dict[str, Tensor]:
    rows = [result.samples for result in reply.results]
    return {TEXT: Tensor("BYTES", [[sample.text for sample in row] for row in rows]), **ends(rows)}


def _reason(reason: inference_pb2.FinishReason.ValueType) -> str:
    return inference_pb2.FinishReason.Name(reason).removeprefix(_PREFIX).lower()


GENERATION = Dialect(Task.GENERATE, GENERATE, prompt_inputs, outputs, build, targets, _tensors, is_decoupled=True)
