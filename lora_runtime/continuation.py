"""One sample of one prompt, as it goes on from its first token to its end. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.generation import Delta, Generation, Sample
from lora_runtime.kv_blocks import BlockTable
from lora_runtime.sampling.finish import FinishReason, finish_after
from lora_runtime.sampling.row import RowState
from lora_runtime.sampling.stops import StopChecker
from lora_runtime.sampling.tokens import SampledToken


class Continuation:
    """Its tokens, where their keys and values lie, and its text so far. Owned by the engine's thread.

    The last token is always one whose keys and values are still to be computed. `num_scheduled` counts those that
    are computed or part of the step under way; a preempted continuation begins again from 0, or from what the prefix
    cache has of it.
    """

    def __init__(
        self, generation: Generation, prompt: Sequence[int], order: tuple[int, int, int], max_length: int
    ) -> None:
        """`order`: the request's arrival, which of its sequences, which sample of that. `max_length`: tokens of prompt
        and text together."""
        self.order = order
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.table: BlockTable | None = None
        self.num_scheduled = 0
        self.num_cached = 0  # of its prompt, when it began
        self.num_inactive = 0  # its first tokens, which an aLoRA leaves to the base
        self.is_running = False  # all tokens but the last are computed, and each step draws one
        self.first_token_at: float | None = None  # monotonic seconds
        self.result: Sample | None = None
        self._generation = generation
        self._max_length = min(max_length, generation.max_length or max_length)
        params = generation.params
        self.row = RowState(
            params,
            prompt,
            eos_token_ids=generation.eos_token_ids,
            mask=None if generation.new_mask is None else generation.new_mask(),
            sample_index=order[2],
        )
        self._text = generation.new_text()
        self._stops = StopChecker(params.stop, include_stop=params.include_stop)
        self._drawn: list[SampledToken] = []
        self._pieces: list[str] = []

    @property
    def index(self) -> int:
        """Which of the request's sequences it continues."""
        return self.order[1]

    @property
    def num_left(self) -> int:
        """Tokens that no step has taken up."""
        return len(self.tokens) - self.num_scheduled

    @property
    def ends_with_next(self) -> bool:
        """Whether the next token is its last, whatever it is."""
        num_next = len(self._drawn) + 1
        return len(self.tokens) + 1 >= self._max_length or num_next >= self._generation.params.max_new_tokens

    def twins(self) -> list[Continuation]:
        """The other samples of the same prompt; none once a token was drawn."""
        if len(self.tokens) > self.num_prompt:
            return []
        others: list[Continuation] = []
        for sample in range(1, self._generation.params.n):
            other = Continuation(self._generation, self.tokens, (*self.order[:2], sample), self._max_length)
            other.num_scheduled, other.num_inactive = self.num_scheduled, self.num_inactive
            others.append(other)
        return others

    def take(self, token: SampledToken) -> Delta:
        """Go on by one token; sets `result` when it is the last. What it adds to the text."""
        if token.token_id is None:  # the mask allows nothing: logits that are not finite fail the request
            return self._end(FinishReason.ERROR, ())
        self._drawn.append(token)
        reason = finish_after(self._generation.params, token.token_id, len(self._drawn), self._generation.eos_token_ids)
        if reason is not None and reason.is_complete:
            return self._end(reason, (token,))
        piece, stop = self._stops.feed(self._text.append(token.token_id))
        if stop is not None:
            return self._end(FinishReason.STOP_STRING, (token,), piece, stop)
        self.tokens.append(token.token_id)
        self.row.append(token.token_id)
        if reason is not None or len(self.tokens) >= self._max_length:
            return self._end(FinishReason.LENGTH, (token,), piece)
        return self._delta(piece, (token,))

    def _end(
        self, reason: FinishReason, tokens: tuple[SampledToken, ...], piece: str = "", stop: str | None = None
    ) -> Delta:
        if stop is None:
            found, stop = self._stops.feed(self._text.flush())
            piece += found
            if stop is None:
                piece += self._stops.flush()
            else:  # the last token's bytes completed it
                reason = FinishReason.STOP_STRING
        delta = self._delta(piece, tokens)
        self.result = Sample("".join(self._pieces), tuple(self._drawn), reason, stop)
        return delta

    def _delta(self, piece: str, tokens: tuple[SampledToken, ...]) -> Delta:
        self._pieces.append(piece)
        return Delta(self.index, self.order[2], piece, tokens)
