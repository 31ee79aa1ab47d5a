"""The other end of `vllm_process`: vLLM as a contender, without its packages in our process."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from server.bench.generate.others import Prompts
from server.bench.generate.plan import RANKS
from server.bench.measure import ContenderFailed

WAYS = ("base", "mixed", "one")
_SCRIPT = Path(__file__).with_name("vllm_process.py")
_START_S = 900.0  # it may compile
_RUN_S = 600.0
_CACHE_GIB = 1
_TOLD_LINES = 15  # of what it printed, when it fails


class Vllm:
    """A process that loads vLLM at once, and generates when it is asked. Use it in a `with` block."""

    def __init__(self, python: Path, threads: int) -> None:
        cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": cores,  # "auto" leaves a core to its server
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed by `close`
        self._process = subprocess.Popen(
            [str(python), str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=_of_another_interpreter() | environment,
            start_new_session=True,
        )
        self.about: dict[str, Any] = {"cores": cores}

    def start(self, base: str, adapters: Sequence[Path], owners: Sequence[int], prompts: Prompts, num: int) -> None:
        """Load the base for prompts of one length and `num` tokens after each; raises ContenderFailed."""
        job = {
            "base": base,
            "adapters": [str(folder) for folder in adapters],
            "owners": list(owners),
            "prompts": [list(prompt) for prompt in prompts],
            "num_tokens": num,
            "max_model_len": len(prompts[0]) + num + 1,
            "max_lora_rank": max(RANKS),
        }
        self.about |= self._ask(job, _START_S)

    def run(self, way: str) -> list[list[int]]:
        """The tokens of every prompt; raises ContenderFailed."""
        return self._ask({"run": way}, _RUN_S)["tokens"]

    def close(self) -> None:
        """End the process and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Vllm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failed("it ended") from error
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise self._failed(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failed("it ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failed(reply["error"])
        return reply

    def _failed(self, reason: str) -> ContenderFailed:
        self._log.seek(0)
        told = "".join(self._log.readlines()[-_TOLD_LINES:])
        return ContenderFailed(f"vLLM: {reason}\n{told}".rstrip())


def _of_another_interpreter() -> dict[str, str]:
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in ours}
