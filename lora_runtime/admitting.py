"""What the engine refuses before it queues a request, so that no batch fails by it."""

from __future__ import annotations

from lora_runtime.catalogue import Catalogue
from lora_runtime.decoding import Decoding
from lora_runtime.errors import InvalidRequest, TextTooLong
from lora_runtime.generation import Generation
from lora_runtime.types import Request, Task, TokenSequence


def check_request(request: Request, catalogue: Catalogue, decoding: Decoding | None) -> None:
    """Raise the reason why a request cannot be run. `decoding` is None where the base generates nothing."""
    if not request.sequences:
        raise InvalidRequest("sequences", "is empty; a request has at least one")
    info = catalogue.get(request.adapter)
    if not info.is_read:
        raise InvalidRequest("adapter", f"{info.id} has not been read yet; prefetch it before it is asked")
    num_ids = info.card_for(request.task).num_token_ids
    for index, sequence in enumerate(request.sequences):
        field = f"inputs[{request.input_index(index)}].text"
        if not sequence.num_tokens:
            raise InvalidRequest(field, "has no tokens")
        if request.generation is not None:
            _check_generation(request, request.generation, sequence, field, decoding)
        if num_ids is not None and max(sequence.input_ids) >= num_ids:  # the batch would fail, for all in it
            message = f"has the token id {max(sequence.input_ids)}, the embedding {num_ids} rows"
            raise InvalidRequest(field, f"{message}; leave out the text that the tokenizer added a token for")


def _check_generation(
    request: Request, generation: Generation, sequence: TokenSequence, field: str, decoding: Decoding | None
) -> None:
    if decoding is None or request.task is not Task.GENERATE:
        raise InvalidRequest("adapter", "the served base does not generate text; ask one that does")
    if sequence.num_tokens >= decoding.max_length:
        raise TextTooLong(field, sequence.num_tokens, decoding.max_length - 1)
    if generation.params.n > decoding.max_sequences:
        most = decoding.max_sequences
        raise InvalidRequest("sampling.n", f"{generation.params.n} is above {most}, the samples that run at once here")
    for name in ("ignore_eos", "min_new_tokens"):
        if generation.new_mask is not None and getattr(generation.params, name):
            raise InvalidRequest(
                f"sampling.{name}", "is set, by the request or the adapter, and a constraint says where its text ends"
            )
