"""Running a benchmark into its result file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.bench.measure import OutputsDiffer

Progress = Callable[[str], None]


def write_result(run: Callable[[Progress], dict[str, Any]], out: Path) -> int:
    """Run, and write what it found; the exit status: 1, and no file, when outputs were wrong."""
    try:
        result = run(lambda line: print(line, file=sys.stderr, flush=True))
    except OutputsDiffer as error:
        print(error, file=sys.stderr)
        return 1
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)
    return 0
