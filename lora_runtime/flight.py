"""One batch through the runner, whatever it holds: launched, drawn from, landed."""

from __future__ import annotations

import logging
import time

from lora_runtime.errors import MultiloraError
from lora_runtime.model.launched import Answer
from lora_runtime.model.runner import Launched, Runner
from lora_runtime.planning import Planned
from lora_runtime.tickets import Work

logger = logging.getLogger(__name__)

Outcome = Answer | MultiloraError  # of one sequence of a batch


class Flight:
    """A batch on its way. Of one that fails, each request is run again by itself when it lands.

    So a request that cannot be run, by its tokens or by its adapter, takes nobody along. A batch that was launched
    before the one before it landed may hold sequences that have ended since: nothing is drawn for those.
    """

    def __init__(self, runner: Runner, planned: Planned, before: Flight | None = None) -> None:
        """Launch it; `before`: the batch that has not landed, some of whose tokens it takes."""
        self.planned = planned
        self.launched_at = time.monotonic()
        self._runner = runner
        self._launched: Launched | None = None
        self._error: MultiloraError | None = None
        self._is_hopeless = False
        try:
            runner.copy_blocks(planned.copies)
        except Exception as error:
            logger.exception("blocks of the KV cache could not be copied")
            self._error, self._is_hopeless = _failed(error), True
            return
        try:
            self._launched = runner.launch(planned.rows(), None if before is None else before._launched)
        except Exception as error:
            logger.exception("a batch of %d sequences could not be launched", len(planned.work))
            self._error = _failed(error)

    @property
    def has_failed(self) -> bool:
        """Whether nothing can follow it before it has landed."""
        return self._launched is None

    def draw(self) -> None:
        """Draw the tokens of the sequences that go on; what the batch before drew is known by now."""
        if self._launched is not None:
            try:
                self._launched.draw([is_alive(item) for item in self.planned.work])
            except Exception as error:
                logger.exception("tokens of a batch of %d sequences could not be drawn", len(self.planned.work))
                self._launched, self._error = None, _failed(error)

    def land(self) -> list[Outcome]:
        """Wait for it: what each sequence gets, undefined for those that were not alive."""
        work, tickets = self.planned.work, self.planned.places_of_tickets()
        try:
            if self._launched is not None:
                return [*self._launched.answers()]
        except Exception as error:
            logger.exception("a batch of %d sequences failed", len(work))
            self._error = _failed(error)
        assert self._error is not None
        outcomes: list[Outcome] = [self._error] * len(work)
        if self._is_hopeless or len(tickets) == 1:
            return outcomes
        for places in tickets.values():
            alive = [i for i in places if is_alive(work[i])]
            for i, outcome in zip(alive, self._run_alone([work[i] for i in alive]), strict=True):
                outcomes[i] = outcome
        return outcomes

    def _run_alone(self, work: list[Work]) -> list[Outcome]:
        if not work:
            return []
        try:
            launched = self._runner.launch(Planned(work, self.planned.residents).rows())
            launched.draw([True] * len(work))
            return [*launched.answers()]
        except Exception as error:
            logger.exception("a request of %d sequences failed", len(work))
            return [_failed(error)] * len(work)


def is_alive(item: Work) -> bool:
    """Whether a sequence still wants what a batch computes of it."""
    return not item.ticket.done and (item.continuation is None or item.continuation.result is None)


def broken(error: BaseException) -> MultiloraError:
    """What a request learns whose text cannot be made."""
    logger.error("a generating request failed", exc_info=error)
    return MultiloraError(f"generation failed: {type(error).__name__}")


def _failed(error: Exception) -> MultiloraError:
    return MultiloraError(f"the forward pass failed: {type(error).__name__}")
