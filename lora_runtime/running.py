"""One batch through the runner, whatever it holds."""

from __future__ import annotations

import logging

from lora_runtime.batch import Row
from lora_runtime.errors import MultiloraError
from lora_runtime.model.runner import Answer, Runner
from lora_runtime.planning import Planned

logger = logging.getLogger(__name__)

Outcome = Answer | MultiloraError  # of one sequence of a batch


def run_planned(runner: Runner, planned: Planned) -> list[Outcome]:
    """What each sequence of the batch gets. Of a batch that fails, each request is run again by itself.

    So a request that cannot be run, by its tokens or by its adapter, takes nobody along.
    """
    rows = planned.rows()
    try:
        runner.copy_blocks(planned.copies)
    except Exception as error:
        logger.exception("blocks of the KV cache could not be copied")
        return [_failed(error)] * len(rows)
    outcomes = _run_rows(runner, rows)
    if isinstance(outcomes[0], MultiloraError) and len(places_of := planned.places_of_tickets()) > 1:
        for places in places_of.values():
            for place, outcome in zip(places, _run_rows(runner, [rows[i] for i in places]), strict=True):
                outcomes[place] = outcome
    return outcomes


def broken(error: BaseException) -> MultiloraError:
    """What a request learns whose text cannot be made."""
    logger.error("a generating request failed", exc_info=error)
    return MultiloraError(f"generation failed: {type(error).__name__}")


def _run_rows(runner: Runner, rows: list[Row]) -> list[Outcome]:
    try:
        return [*runner.run(rows)]
    except Exception as error:
        logger.exception("a batch of %d sequences failed", len(rows))
        return [_failed(error)] * len(rows)


def _failed(error: Exception) -> MultiloraError:
    return MultiloraError(f"the forward pass failed: {type(error).__name__}")
