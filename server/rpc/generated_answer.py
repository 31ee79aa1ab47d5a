"""AnswerQuestion of an adapter that generates: questions, and perhaps contexts, to answers that are written."""

from __future__ import annotations

from lora_runtime.errors import InvalidRequest
from lora_runtime.generation import Generated, Sample
from lora_runtime.types import AdapterCard, Result, Task, TokenSequence
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, Prepared, Target, outputs_of
from server.rpc.generated import FINISH_REASONS, usage
from server.rpc.generating import prepare_prompts
from server.rpc.prompts import Prompt, check_fields, fields_of, filled, templated
from server.rpc.sampling import GREEDY, sampling_params


def _check(request: inference_pb2.AnswerQuestionRequest) -> None:
    for field in ("allow_no_answer", "doc_stride"):
        if getattr(request, field):
            raise InvalidRequest(field, "is for extractive adapters, and this one generates; leave it unset")
    if request.top_k > 1:
        raise InvalidRequest("top_k", f"{request.top_k} is more than 1; an adapter that generates gives one answer")
    for index, item in enumerate(request.inputs):
        if not item.question:
            raise InvalidRequest(f"inputs[{index}].question", "is empty")


def _prepare(
    request: inference_pb2.AnswerQuestionRequest, target: Target
) -> Prepared[inference_pb2.AnswerQuestionResponse]:
    _check(request)  # here: that the adapter generates may be known only now
    asked = inference_pb2.SamplingParams()
    if request.HasField("max_answer_tokens"):
        limit = target.max_new_tokens
        if request.max_answer_tokens > limit:
            problem = f"{request.max_answer_tokens} is more than the server allows, which is {limit}"
            raise InvalidRequest("max_answer_tokens", problem, limit=limit)
        asked.max_new_tokens = request.max_answer_tokens
    params = sampling_params(asked, target, GREEDY)
    return prepare_prompts(_prompts(request, target.card), params, target, _response)


def _prompts(request: inference_pb2.AnswerQuestionRequest, card: AdapterCard) -> list[Prompt]:
    spec = templated(card)
    if spec is None:
        problem = "generates, and has no prompt template to put a question into; use Generate"
        raise InvalidRequest("adapter", problem)
    check_fields(spec, ("question", "context"), "question", "AnswerQuestion")
    takes_context = "context" in fields_of(spec)
    prompts: list[Prompt] = []
    for index, item in enumerate(request.inputs):
        place = f"inputs[{index}]"
        if item.context and not takes_context:
            raise InvalidRequest(f"{place}.context", "is given, but the adapter's prompt template has no such field")
        values = {"question": item.question, **({"context": item.context} if takes_context else {})}
        longest = "context" if len(item.context) > len(item.question) else "question"
        prompts.append(filled(spec, place, values, f"{place}.{longest}"))
    return prompts


def _response(sequences: tuple[TokenSequence, ...], result: Result) -> inference_pb2.AnswerQuestionResponse:
    outputs = outputs_of(result, Generated)
    return inference_pb2.AnswerQuestionResponse(
        results=[
            inference_pb2.AnswerQuestionResult(
                answers=[_answer(output.samples[0])], num_tokens=sequence.num_tokens, num_windows=1
            )
            for output, sequence in zip(outputs, sequences, strict=True)
        ],
        usage=usage(sequences, outputs),
    )


def _answer(sample: Sample) -> inference_pb2.Answer:
    return inference_pb2.Answer(text=sample.text, generated=True, finish_reason=FINISH_REASONS[sample.finish_reason])


GENERATED_ANSWER = Call(Task.GENERATE, _check, _prepare)
