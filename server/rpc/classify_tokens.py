"""ClassifyTokens: texts to labels of their tokens, words or entities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_runtime.answers.token_classes import SubwordStrategy, TokenLabel, TokenUnit, label_tokens
from lora_runtime.errors import InvalidRequest
from lora_runtime.types import Result, Task, TokenClassification
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Call, Prepared, Target, labels_of, outputs_of

if TYPE_CHECKING:  # brings transformers
    from lora_runtime.model.encoder_text import TokenText

UNITS: dict[inference_pb2.TokenUnit.ValueType, TokenUnit] = {
    inference_pb2.TOKEN_UNIT_UNSPECIFIED: TokenUnit.WORDS,
    inference_pb2.TOKEN_UNIT_TOKENS: TokenUnit.TOKENS,
    inference_pb2.TOKEN_UNIT_WORDS: TokenUnit.WORDS,
    inference_pb2.TOKEN_UNIT_ENTITIES: TokenUnit.ENTITIES,
}
STRATEGIES: dict[inference_pb2.SubwordStrategy.ValueType, SubwordStrategy] = {
    inference_pb2.SUBWORD_STRATEGY_UNSPECIFIED: SubwordStrategy.FIRST,
    inference_pb2.SUBWORD_STRATEGY_FIRST: SubwordStrategy.FIRST,
    inference_pb2.SUBWORD_STRATEGY_AVERAGE: SubwordStrategy.AVERAGE,
    inference_pb2.SUBWORD_STRATEGY_MAX: SubwordStrategy.MAX,
}


def _check(request: inference_pb2.ClassifyTokensRequest) -> None:
    if request.unit not in UNITS:
        raise InvalidRequest("unit", f"{request.unit} is not a TokenUnit; leave it unset for words")
    if request.subword_strategy not in STRATEGIES:
        raise InvalidRequest(
            "subword_strategy", f"{request.subword_strategy} is not a SubwordStrategy; leave it unset for FIRST"
        )


def _prepare(
    request: inference_pb2.ClassifyTokensRequest, target: Target
) -> Prepared[inference_pb2.ClassifyTokensResponse]:
    for index, item in enumerate(request.inputs):
        if item.HasField("text_pair"):
            raise InvalidRequest(f"inputs[{index}].text_pair", "is set; tokens are labelled in single texts")
    texts = [item.text for item in request.inputs]
    tokens = target.encoder.encode_tokens(texts, max_length=target.card.max_length, truncate=request.truncate)
    sequences = tuple(item.sequence for item in tokens)
    return Prepared(sequences, lambda result: _response(request, texts, tokens, result))


def _response(
    request: inference_pb2.ClassifyTokensRequest, texts: list[str], tokens: tuple[TokenText, ...], result: Result
) -> inference_pb2.ClassifyTokensResponse:
    labels = labels_of(result)
    unit, strategy = UNITS[request.unit], STRATEGIES[request.subword_strategy]
    outputs = outputs_of(result, TokenClassification)
    return inference_pb2.ClassifyTokensResponse(
        results=[
            inference_pb2.ClassifyTokensResult(
                spans=[
                    _span(text, found, with_scores=request.return_scores)
                    for found in label_tokens(tokenised, output, labels, unit=unit, strategy=strategy)
                ],
                num_tokens=tokenised.sequence.num_tokens,
                truncated=tokenised.sequence.truncated,
            )
            for text, tokenised, output in zip(texts, tokens, outputs, strict=True)
        ],
        labels=labels,
    )


def _span(text: str, found: TokenLabel, *, with_scores: bool) -> inference_pb2.LabelledSpan:
    return inference_pb2.LabelledSpan(
        start=found.start,
        end=found.end,
        text=text[found.start : found.end],
        label=found.label,
        score=found.score,
        scores=found.scores if with_scores else (),
    )


CLASSIFY_TOKENS = Call(Task.CLASSIFY_TOKENS, _check, _prepare)
