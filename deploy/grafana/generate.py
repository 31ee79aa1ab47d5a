"""Write the dashboards beside this file: `python -m deploy.grafana.generate`, from the root of the repository.

`--check` changes nothing, and exits with 1 and the names of those that are not as `dashboards.py` says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from deploy.grafana.dashboards import DASHBOARDS
from deploy.grafana.panels import Json, to_json

FOLDER = Path(__file__).parent / "dashboards"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write or check the JSON of the dashboards.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is stale")
    check = parser.parse_args().check
    stale = 0
    for name, text in rendered().items():
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        print(f"{path.name}: {'differs' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and stale > 0)


def rendered() -> dict[str, str]:
    """Name and text of each file."""
    return {f"{one.name}.json": _dump(to_json(one, DASHBOARDS)) for one in DASHBOARDS}


def _dump(dashboard: Json) -> str:
    """A line for each panel, so that a change of one is a change of a line."""
    panels = dashboard.pop("panels")
    head = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in dashboard.items())
    body = ",\n".join(f"  {json.dumps(panel)}" for panel in panels)
    return f'{{\n{head},\n "panels": [\n{body}\n ]\n}}\n'


if __name__ == "__main__":
    raise SystemExit(main())
