"""Generate and GenerateStream: prompts to texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lora_runtime.errors import InvalidRequest
from lora_runtime.generation import Generated
from lora_runtime.types import Result, Task, TokenSequence
from server.deltas import Piece
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, Prepared, ReplyT, Target, outputs_of
from server.rpc.generated import sample_end, sample_message, token_messages, usage
from server.rpc.generating import prepare_prompts
from server.rpc.prompts import check_prompt, prompt_of
from server.rpc.sampling import check_constraint, num_samples, sampling_params


def part_message(request: inference_pb2.GenerateRequest, piece: Piece) -> inference_pb2.GenerateStreamResponse | None:
    """A piece of a stream, or nothing where it has nothing to tell."""
    delta = inference_pb2.SampleDelta(sample=piece.sample, text=piece.text)
    if _wants_tokens(request):
        delta.tokens.extend(token_messages(piece.tokens))
    return inference_pb2.GenerateStreamResponse(delta=delta) if delta.text or delta.tokens else None


def _check(request: inference_pb2.GenerateRequest) -> None:
    num_samples(request.sampling)
    check_constraint(request.constraint, is_given=request.HasField("constraint"))
    for index, item in enumerate(request.inputs):
        check_prompt(f"inputs[{index}]", item)


def _check_stream(request: inference_pb2.GenerateRequest) -> None:
    if len(request.inputs) != 1:
        raise InvalidRequest("inputs", f"has {len(request.inputs)} entries; a stream takes exactly one")
    _check(request)


def _prepare(
    request: inference_pb2.GenerateRequest,
    target: Target,
    respond: Callable[[inference_pb2.GenerateRequest, tuple[TokenSequence, ...], Result], ReplyT],
) -> Prepared[ReplyT]:
    params = sampling_params(request.sampling, target)
    prompts = [prompt_of(f"inputs[{index}]", item, target.card) for index, item in enumerate(request.inputs)]
    constraint = request.constraint if request.HasField("constraint") else None
    return prepare_prompts(prompts, params, target, partial(respond, request), constraint)


def _response(
    request: inference_pb2.GenerateRequest, sequences: tuple[TokenSequence, ...], result: Result
) -> inference_pb2.GenerateResponse:
    outputs = outputs_of(result, Generated)
    return inference_pb2.GenerateResponse(
        results=[
            inference_pb2.GenerateResult(
                samples=[sample_message(sample, with_tokens=_wants_tokens(request)) for sample in output.samples],
                num_prompt_tokens=sequence.num_tokens,
                num_cached_prompt_tokens=output.num_cached_tokens,
            )
            for output, sequence in zip(outputs, sequences, strict=True)
        ],
        usage=usage(sequences, outputs),
    )


def _end(
    _request: inference_pb2.GenerateRequest, sequences: tuple[TokenSequence, ...], result: Result
) -> inference_pb2.GenerateStreamEnd:
    outputs = outputs_of(result, Generated)
    samples = [sample_end(sample) for output in outputs for sample in output.samples]
    return inference_pb2.GenerateStreamEnd(samples=samples, usage=usage(sequences, outputs))


def _wants_tokens(request: inference_pb2.GenerateRequest) -> bool:
    return request.return_tokens or request.sampling.HasField("logprobs")


def _num_samples(request: inference_pb2.GenerateRequest) -> int:
    return num_samples(request.sampling)


GENERATE: Call[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse] = Call(
    Task.GENERATE, _check, lambda request, target: _prepare(request, target, _response), _num_samples
)
GENERATE_STREAM: Call[inference_pb2.GenerateRequest, inference_pb2.GenerateStreamEnd] = Call(
    Task.GENERATE, _check_stream, lambda request, target: _prepare(request, target, _end), _num_samples
)
