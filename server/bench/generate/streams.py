"""What a stream's reader waits for: the first token, alone and beside others, and each next one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_runtime.types import AdapterInfo
from server.bench.generate.others import Prompts
from server.bench.generate.own import OwnEngine, sample_of
from server.bench.generate.rounds import Figures

_RUNNING_TOKENS = 2  # that a text has before it counts as decoding


class Streams:
    """The last of the prompts is the newcomer; the others run when it arrives."""

    def __init__(
        self, own: OwnEngine, infos: Sequence[AdapterInfo], prompts: Prompts, long_prompt: tuple[int, ...], half: int
    ) -> None:
        self._own = own
        self._others = [*zip(infos, prompts, strict=True)][:-1]
        self._newcomer = infos[-1], prompts[-1]
        self._long = infos[-1], long_prompt
        self._half = half  # tokens of the others, after which the long prompt arrives

    def first_token_alone(self) -> Figures:
        watched, future = self._own.watch(*self._newcomer)
        sample_of(future)
        return {"first_token_ms alone": 1e3 * watched.first_token_s}

    def first_token_beside(self) -> Figures:
        """While the others decode."""
        running = [self._own.watch(*other, _RUNNING_TOKENS) for other in self._others]
        for watched, _ in running:
            watched.wait()
        watched, future = self._own.watch(*self._newcomer)
        for asked in (future, *(other for _, other in running)):
            sample_of(asked)
        return {"first_token_ms beside": 1e3 * watched.first_token_s}

    def gaps_quiet(self) -> Figures:
        """Of the others, nobody arriving."""
        return self._gaps("quiet", None)

    def gaps_arrival(self) -> Figures:
        """Of the others, a long prompt arriving amid them."""
        return self._gaps("arrival", self._long)

    def _gaps(self, name: str, arriving: tuple[AdapterInfo, tuple[int, ...]] | None) -> Figures:
        running = [self._own.watch(*other, self._half) for other in self._others]
        asked = [future for _, future in running]
        if arriving is not None:
            running[0][0].wait()
            asked.append(self._own.submit(*arriving, num_tokens=1))
        for future in asked:
            sample_of(future)
        gaps = 1e3 * np.array([gap for watched, _ in running for gap in watched.gaps_s])
        middle, late = (float(np.percentile(gaps, percent)) for percent in (50, 99))
        return {f"gap_ms {name} p50": middle, f"gap_ms {name} p99": late}
