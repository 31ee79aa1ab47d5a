"""What one request generates, counted as it comes: for its tenant, for the metrics, and for its reply."""

from __future__ import annotations

from lora_runtime.generation import Delta, Generated
from lora_runtime.sampling.finish import FinishReason
from lora_runtime.types import Result
from server.metrics import ServerMetrics
from server.tenancy.limits import TenantPermit
from server.tenancy.usage import num_generated_tokens


class GenerationMeter:
    """A `DeltaAccount` of a request that arrived at `arrived_s` of `time.monotonic()`."""

    def __init__(self, metrics: ServerMetrics, charge: TenantPermit, arrived_s: float, num_samples: int) -> None:
        """`num_samples` are those of all its sequences."""
        self._metrics = metrics
        self._charge = charge
        self._arrived_s = arrived_s
        self._num_samples = num_samples
        self.num_tokens = 0  # that were generated so far
        self._latest_s: dict[tuple[int, int], float] = {}  # by sequence and sample, when the last token came
        self.first_token_s: float | None = None  # since the arrival

    def add(self, delta: Delta, at_s: float) -> None:
        if not delta.tokens:
            return
        self._count(len(delta.tokens))
        if self.first_token_s is None:
            self.first_token_s = max(0.0, at_s - self._arrived_s)
            self._metrics.observe_first_token(self.first_token_s)
        place = (delta.sequence, delta.sample)
        if place in self._latest_s:
            for _ in delta.tokens:  # several of one step came at once, and a reader gets them so
                self._metrics.observe_token((at_s - self._latest_s[place]) / len(delta.tokens))
        self._latest_s[place] = at_s

    def finish(self, result: Result) -> None:
        """The request is answered; a token that no delta had is counted now."""
        self._count(num_generated_tokens(result) - self.num_tokens)
        for output in result.outputs:
            for sample in output.samples if isinstance(output, Generated) else ():
                self._metrics.count_finished(sample.finish_reason)

    def fail(self, reason: FinishReason) -> None:
        """The request ends without an answer."""
        self._metrics.count_finished(reason, self._num_samples)

    def _count(self, num_tokens: int) -> None:
        if num_tokens > 0:
            self.num_tokens += num_tokens
            self._metrics.count_generated(num_tokens)
            self._charge.add_generated(num_tokens)
