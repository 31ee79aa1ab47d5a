"""The process that renders chat templates of adapters. Run as a file, with the descriptor of a socket.

An adapter's template is a program of somebody else's. transformers runs it in jinja2's sandbox; what no sandbox bounds,
time and memory, the kernel bounds here: the timer of a render that takes too long ends this process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MAX_CPU_S = 1.0  # of all conversations of one call
MAX_BYTES = 512 << 20  # of memory beyond what the process starts with
MAX_RENDERED_CHARS = 1 << 20  # of one conversation
_MAX_REASON_CHARS = 200


class RenderedTooLong(ValueError):
    """A conversation became more than MAX_RENDERED_CHARS."""


def main(descriptor: int) -> None:
    _limit()
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # the server has gone
        while True:
            answer = _answer(json.loads(connection.recv_bytes()))
            connection.send_bytes(json.dumps(answer).encode())


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """`texts`, or `index` of the conversation that failed and `reason`."""
    texts: list[str] = []
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        while len(texts) < len(request["conversations"]):
            texts.append(_render(request["template"], request["conversations"][len(texts)], request["tokens"]))
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its answer
        return {"index": len(texts), "reason": describe(error, request["template"])}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"texts": texts}


def _render(template: str, conversation: list[dict[str, str]], tokens: dict[str, str]) -> str:
    options: dict[str, Any] = {**tokens, "add_generation_prompt": True}
    rendered: Any = render_jinja_template(conversations=[conversation], chat_template=template, **options)
    text: str = rendered[0][0]
    if len(text) > MAX_RENDERED_CHARS:
        raise RenderedTooLong
    return text


def describe(error: Exception, template: str) -> str:
    """Why rendering failed; what an exception says only where the template has it, so that no request is quoted."""
    said = str(error)[:_MAX_REASON_CHARS]
    return said if said and said in template else type(error).__name__


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sizes = Path("/proc/self/statm")
    if sizes.exists():  # elsewhere time alone is bounded
        num_bytes = int(sizes.read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


if __name__ == "__main__":
    main(int(sys.argv[1]))
