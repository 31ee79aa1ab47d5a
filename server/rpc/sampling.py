"""What a request says of sampling and constraints, with the adapter's defaults, as the runtime takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_runtime.errors import InvalidRequest
from lora_runtime.generation import Generation
from lora_runtime.sampling.params import MAX_SAMPLES, SamplingParams
from lora_runtime.types import TokenSequence
from server.pb.multilora.v1 import inference_pb2
from server.rpc.call import Target

if TYPE_CHECKING:
    from server.backend import TextGeneration

GREEDY: Mapping[str, Any] = {"temperature": 0.0}  # defaults of methods that are to give the likeliest text
_LISTS = frozenset({"stop", "stop_token_ids"})
_DEFAULTS = SamplingParams()


def num_samples(asked: inference_pb2.SamplingParams) -> int:
    """Samples of each input, which no adapter has a default for; raises InvalidRequest on `sampling.n`."""
    if not asked.HasField("n"):
        return _DEFAULTS.n
    if not 1 <= asked.n <= MAX_SAMPLES:
        raise InvalidRequest("sampling.n", f"{asked.n} is not an integer from 1 to {MAX_SAMPLES}")
    return asked.n


def check_constraint(constraint: inference_pb2.Constraint, *, is_given: bool) -> None:
    """Raise InvalidRequest on `constraint` when it is given and says nothing."""
    if is_given and constraint.WhichOneof("kind") is None:
        raise InvalidRequest("constraint", "is empty; set json_schema or regex, or leave it out")


def sampling_params(
    asked: inference_pb2.SamplingParams, target: Target, method_defaults: Mapping[str, Any] | None = None
) -> SamplingParams:
    """What is asked, else the adapter's defaults, else the method's, else those of SamplingParams; with a seed.

    Raises InvalidRequest on `sampling.*`. Defaults are made to fit what is asked: those of `max_new_tokens` are cut to
    the server's limit, those of `min_new_tokens` to the most.
    """
    given = _given(asked)
    limit = target.max_new_tokens
    if given.get("max_new_tokens", 0) > limit:
        problem = f"{given['max_new_tokens']} is more than the server allows, which is {limit}"
        raise InvalidRequest("sampling.max_new_tokens", problem, limit=limit)
    defaults = {**(method_defaults or {}), **({} if target.card.prompt is None else target.card.prompt.defaults)}
    values = {**defaults, **given}
    values["max_new_tokens"] = min(values.get("max_new_tokens", _DEFAULTS.max_new_tokens), limit)
    if "min_new_tokens" not in given:
        values["min_new_tokens"] = min(values.get("min_new_tokens", 0), max(values["max_new_tokens"], 0))
    return SamplingParams(**values).seeded()


def check_one_sample(asked: inference_pb2.SamplingParams, remedy: str) -> None:
    """Raise InvalidRequest on `sampling.n` for more than one."""
    if num_samples(asked) != 1:
        raise InvalidRequest("sampling.n", f"{asked.n} is not 1; {remedy}")


def generation(
    text: TextGeneration,
    params: SamplingParams,
    sequences: Sequence[TokenSequence],
    max_length: int | None,
    constraint: inference_pb2.Constraint | None = None,
) -> Generation:
    """For prompts of at most `max_length` tokens, text included (None: what the base allows).

    Raises InvalidRequest on `sampling.min_new_tokens`, `sampling.stop_token_ids[i]`, `constraint.*`.
    """
    params.check_vocabulary(text.vocab_size)
    room = min(text.room(sequence, max_length) for sequence in sequences)
    if params.min_new_tokens > room:
        problem = f"{params.min_new_tokens} is more than the context has room for after the prompt, which is {room}"
        raise InvalidRequest("sampling.min_new_tokens", problem)
    return Generation(
        params=params,
        new_text=text.new_text,
        eos_token_ids=text.eos_token_ids,
        new_mask=None if constraint is None else _mask(text, constraint),
        max_length=max_length,
    )


def _mask(text: TextGeneration, constraint: inference_pb2.Constraint) -> Any:
    from lora_runtime.sampling.constrained import ConstraintKind  # brings tokenizers, which a server has by then

    kind = constraint.WhichOneof("kind")
    assert kind is not None, "an empty constraint was refused"
    return text.compile(ConstraintKind(kind), getattr(constraint, kind))


def _given(asked: inference_pb2.SamplingParams) -> dict[str, Any]:
    """The fields that are set, by name, which are those of SamplingParams."""
    return {field.name: tuple(value) if field.name in _LISTS else value for field, value in asked.ListFields()}
