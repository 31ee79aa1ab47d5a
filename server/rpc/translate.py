"""Translate: texts, and perhaps their languages, to texts in another language."""

from __future__ import annotations

from lora_runtime.errors import InvalidRequest
from lora_runtime.generation import Generated, Sample
from lora_runtime.prompts.spec import PromptSpec
from lora_runtime.types import AdapterCard, Result, Task, TokenSequence
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, Prepared, Target, outputs_of
from server.rpc.generated import FINISH_REASONS, usage
from server.rpc.generating import prepare_prompts
from server.rpc.prompts import Prompt, check_fields, fields_of, filled, templated
from server.rpc.sampling import GREEDY, check_one_sample, sampling_params

_LANGUAGES = ("source_language", "target_language")


def _check(request: inference_pb2.TranslateRequest) -> None:
    check_one_sample(request.sampling, "a text gets one translation; Generate gives several samples")
    for index, item in enumerate(request.inputs):
        if item.HasField("text_pair"):
            raise InvalidRequest(f"inputs[{index}].text_pair", "is set; single texts are translated")


def _prepare(request: inference_pb2.TranslateRequest, target: Target) -> Prepared[inference_pb2.TranslateResponse]:
    params = sampling_params(request.sampling, target, GREEDY)
    return prepare_prompts(_prompts(request, target.card), params, target, _response)


def _prompts(request: inference_pb2.TranslateRequest, card: AdapterCard) -> list[Prompt]:
    spec = templated(card)
    languages = {name: getattr(request, name) for name in _LANGUAGES if request.HasField(name)}
    if spec is not None:
        check_fields(spec, ("text", *_LANGUAGES), "text", "Translate")
    _check_languages(languages, spec)
    places = [f"inputs[{index}]" for index in range(len(request.inputs))]
    if spec is None:
        return [Prompt(item.text, f"{place}.text") for place, item in zip(places, request.inputs, strict=True)]
    return [
        filled(spec, place, {"text": item.text, **languages}, f"{place}.text")
        for place, item in zip(places, request.inputs, strict=True)
    ]


def _check_languages(languages: dict[str, str], spec: PromptSpec | None) -> None:
    """Those that the template asks for are given, and no others."""
    fields = frozenset[str]() if spec is None else fields_of(spec)
    for name in _LANGUAGES:
        if name in languages and name not in fields:
            has = "no prompt template" if spec is None else "a prompt template without it"
            raise InvalidRequest(name, f"is given, but the adapter has {has}; leave it unset")
        if name in fields and not languages.get(name):
            raise InvalidRequest(name, "is missing; the adapter's prompt template asks for it")


def _response(sequences: tuple[TokenSequence, ...], result: Result) -> inference_pb2.TranslateResponse:
    outputs = outputs_of(result, Generated)
    return inference_pb2.TranslateResponse(
        results=[_result(output.samples[0]) for output, _ in zip(outputs, sequences, strict=True)],
        usage=usage(sequences, outputs),
    )


def _result(sample: Sample) -> inference_pb2.TranslateResult:
    return inference_pb2.TranslateResult(
        text=sample.text, finish_reason=FINISH_REASONS[sample.finish_reason], num_tokens=len(sample.tokens)
    )


TRANSLATE = Call(Task.GENERATE, _check, _prepare)
