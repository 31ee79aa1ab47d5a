"""What the runtime generated, as messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lora_runtime.generation import Generated, Sample
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.sampling.tokens import SampledToken
from lora_runtime.types import TokenSequence
from server.pb.multilora.v1 import inference_pb2

FINISH_REASONS: dict[FinishReason, inference_pb2.FinishReason.ValueType] = {
    FinishReason.EOS: inference_pb2.FINISH_REASON_EOS,
    FinishReason.STOP_TOKEN: inference_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: inference_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: inference_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}


def usage(sequences: Sequence[TokenSequence], outputs: Sequence[Generated]) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=sum(sequence.num_tokens for sequence in sequences),
        cached_prompt_tokens=sum(output.num_cached_tokens for output in outputs),
        generated_tokens=sum(len(sample.tokens) for output in outputs for sample in output.samples),
    )


def sample_message(sample: Sample, *, with_tokens: bool) -> inference_pb2.GeneratedSample:
    return inference_pb2.GeneratedSample(
        text=sample.text,
        finish_reason=FINISH_REASONS[sample.finish_reason],
        stop=sample.stop or "",
        num_tokens=len(sample.tokens),
        tokens=token_messages(sample.tokens) if with_tokens else (),
    )


def sample_end(sample: Sample) -> inference_pb2.SampleEnd:
    return inference_pb2.SampleEnd(
        finish_reason=FINISH_REASONS[sample.finish_reason], stop=sample.stop or "", num_tokens=len(sample.tokens)
    )


def token_messages(tokens: Iterable[SampledToken]) -> list[inference_pb2.GeneratedToken]:
    """All but one that could not be drawn."""
    return [
        inference_pb2.GeneratedToken(
            token_id=token.token_id,
            logprob=token.logprob,
            top_logprobs=[
                inference_pb2.TokenLogprob(token_id=other.token_id, logprob=other.logprob)
                for other in token.top_logprobs
            ],
        )
        for token in tokens
        if token.token_id is not None
    ]
