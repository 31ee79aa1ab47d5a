"""Threads that load, unload and ask one adapter, in a process of its own: work on standard input, result on output."""

from __future__ import annotations

import json
import random
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from lora_runtime.errors import MultiloraError
from lora_runtime.runtime import Runtime, RuntimeSettings
from lora_runtime.types import AdapterState, Classification, Request, Task
from server.bench.adapters.plan import TOLERANCE
from server.bench.adapters.servers import rss_bytes

_STAGES = 8  # between which memory is looked at; the first is for what is allocated once


class Churn:
    """One adapter of one runtime."""

    def __init__(self, work: dict[str, Any]) -> None:
        settings = RuntimeSettings(num_threads=work["torch_threads"])
        self._runtime = Runtime(work["base"], settings)
        self._adapter = self._runtime.load(work["folder"]).id
        texts = [(text, None) for text in work["texts"]]
        self._sequences = self._runtime.encoder.encode(texts, max_length=None, truncate=False)
        self._logits = np.asarray(work["logits"], np.float32)
        self._work = work
        self._done: Counter[str] = Counter()
        self._door = threading.Lock()

    def run(self) -> dict[str, Any]:
        """AssertionError when arena, slots and records do not agree, or an answer was wrong."""
        rss: list[float] = []
        for stage in range(_STAGES):
            threads = [threading.Thread(target=self._thread, args=(stage, n)) for n in range(self._work["threads"])]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self._runtime.engine.check_integrity()
            rss.append(float(rss_bytes()))
        freed = self._runtime.engine.unload(self._adapter).result()
        self._runtime.engine.check_integrity()
        state = self._runtime.engine.catalogue.get(self._adapter).state
        self._runtime.close()
        assert not self._done["wrong"], f"{self._done['wrong']} answers were wrong"
        assert self._done["ask"], "nothing was asked"
        assert freed.info.state is state is AdapterState.REGISTERED, f"the adapter is {state} after all"
        return {
            "operations": {name: self._done[name] for name in ("load", "unload", "ask")},
            "failed": sum(count for name, count in self._done.items() if name.startswith("failed")),
            "failures": {name: count for name, count in self._done.items() if name.startswith("failed")},
            "rss_bytes": rss,
            "rss_growth_bytes": rss[-1] - rss[0],
        }

    def _thread(self, stage: int, number: int) -> None:
        chance = random.Random(1000 * stage + number)
        for turn in range(self._work["operations"] // _STAGES):
            kind = chance.choice(("load", "unload", "ask"))
            try:
                outcome = self._do(kind, f"{stage}-{number}-{turn}", chance.randrange(len(self._sequences)))
            except MultiloraError as error:
                outcome = f"failed {kind}: {type(error).__name__}"
            with self._door:
                self._done[outcome] += 1

    def _do(self, kind: str, name: str, text: int) -> str:
        engine = self._runtime.engine
        if kind != "ask":
            future: Future[Any] = engine.load(self._adapter) if kind == "load" else engine.unload(self._adapter)
            future.result()
            return kind
        request = Request(name, self._adapter, Task.CLASSIFY, (self._sequences[text],))
        output = engine.submit(request).result().outputs[0]
        assert isinstance(output, Classification), f"{output} is no classification"
        error = np.abs(np.asarray(output.logits, np.float32) - self._logits[text]).max()
        return kind if error <= TOLERANCE else "wrong"


def main() -> None:
    work: dict[str, Any] = json.load(sys.stdin)
    work["folder"] = Path(work["folder"])
    print(json.dumps(Churn(work).run()))


if __name__ == "__main__":
    main()
