"""What is wrong with an adapter: the first problem when loading, all of them when inspecting."""

from __future__ import annotations

from types import TracebackType

from lora_runtime.errors import AdapterRejected


class Findings:
    """Problems and warnings of one folder. By default the first problem is raised; `collect` keeps them all."""

    def __init__(self, *, collect: bool = False) -> None:
        self.problems: list[AdapterRejected] = []
        self.warnings: list[str] = []
        self._collect = collect

    def warn(self, message: str) -> None:
        """Note what is odd but changes no answer."""
        self.warnings.append(message)

    def attempt(self) -> Findings:
        """A block that may raise AdapterRejected; when collecting, the problem is kept and the block left."""
        return self

    def __enter__(self) -> Findings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        del kind, trace
        if not self._collect or not isinstance(error, AdapterRejected):
            return False
        self.problems.append(error)
        return True
