"""From prompts and sampling to a request that generates: what its methods have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_runtime.sampling.params import SamplingParams
from lora_runtime.types import Result, TokenSequence
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Prepared, ReplyT, Target
from server.rpc.prompts import Prompt, encode
from server.rpc.sampling import generation


def prepare_prompts(
    prompts: Sequence[Prompt],
    params: SamplingParams,
    target: Target,
    respond: Callable[[tuple[TokenSequence, ...], Result], ReplyT],
    constraint: inference_pb2.Constraint | None = None,
) -> Prepared[ReplyT]:
    """The prompts within what base and adapter allow; `respond` makes the reply of their tokens and what they became.

    Raises InvalidRequest on the field that a prompt came in, `sampling.*` or `constraint.*`.
    """
    text, max_length = target.generation, target.card.max_length
    sequences = encode(text, prompts, max_length=max_length)
    return Prepared(
        sequences,
        lambda result: respond(sequences, result),
        generation=generation(text, params, sequences, max_length, constraint),
    )
