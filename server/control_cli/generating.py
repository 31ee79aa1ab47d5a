"""Requests for generated text, and what people and machines read of the replies."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import grpc
import typer

from server.control_cli.client import Client, ControlError, connection
from server.control_cli.failure import REFUSED
from server.control_cli.output import as_dict, note, print_json
from server.pb.multilora.v1 import inference_pb2 as pb

_LATE = "ask for less with --max-new-tokens, or wait longer with --timeout"


def connected(command: str, server: str, timeout_s: float) -> AbstractContextManager[Client]:
    """A client for one command that generates; errors end the program as those of other commands do."""
    return connection(command, server, timeout_s, _LATE)


def sampling_of(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    max_new_tokens: int | None,
    stop: Sequence[str] | None,
    seed: int | None,
) -> pb.SamplingParams:
    """What was given; raises ControlError for a number that no message holds."""
    try:
        return pb.SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stop=stop or (),
            seed=seed,
            n=1,
        )
    except ValueError as error:
        raise ControlError(f"a number is out of range: {error}") from None


def constraint_of(json_schema: Path | None, regex: str | None) -> pb.Constraint | None:
    """What a reply must be; raises ControlError when both are given or the file cannot be read."""
    if json_schema is not None and regex is not None:
        raise ControlError("--json-schema and --regex exclude each other; give one")
    if json_schema is not None:
        try:
            return pb.Constraint(json_schema=json_schema.read_text(encoding="utf-8"))
        except OSError as error:
            raise ControlError(f"--json-schema: {json_schema} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ControlError(f"--json-schema: {json_schema} is not UTF-8") from None
    return None if regex is None else pb.Constraint(regex=regex)


def request_of(adapter: str, sampling: pb.SamplingParams, constraint: pb.Constraint | None) -> pb.GenerateRequest:
    """Without a prompt yet."""
    return pb.GenerateRequest(adapter=adapter, sampling=sampling, constraint=constraint)


def prompt_of(prompt: str | None, fields: Sequence[str]) -> pb.PromptInput:
    """A text, or fields as NAME=VALUE; raises ControlError when both are given or neither."""
    if not fields:
        return pb.PromptInput(text=text_of(prompt, "PROMPT", "--field NAME=VALUE"))
    if prompt is not None:
        raise ControlError("PROMPT and --field exclude each other; give one")
    values: dict[str, str] = {}
    for field in fields:
        name, mark, value = field.partition("=")
        if not mark or not name:
            raise ControlError(f"--field: {field[:80]!r} is not NAME=VALUE")
        if name in values:
            raise ControlError(f"--field: {name!r} is given twice")
        values[name] = value
    return pb.PromptInput(fields=values)


def text_of(text: str | None, name: str, otherwise: str = "") -> str:
    """The argument, or standard input without its last newline for `-` and where nothing is given.

    Raises ControlError where nothing is given on a terminal.
    """
    if text is not None and text != "-":
        return text
    if text is None and sys.stdin.isatty():
        others = f", {otherwise}" if otherwise else ""
        raise ControlError(f"give a {name}{others}, or - to type it and end with Ctrl-D")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise ControlError("standard input is not UTF-8") from None


def parts(client: Client, request: pb.GenerateRequest) -> Generator[pb.GenerateStreamResponse]:
    """A reply as it comes; it is asked for again only while nothing has come. Raises grpc.RpcError.

    Closing it ends the work in the server.
    """
    call, first = client.retry(lambda timeout_s: _begun(client, request, timeout_s))
    try:
        yield first
        yield from call
    finally:
        call.cancel()


def show(client: Client, request: pb.GenerateRequest, *, as_json: bool) -> str:
    """Write a reply to standard output as it comes, or as a line of JSON at its end; returns its text.

    Raises ControlError when the model could not go on.
    """
    texts: list[str] = []
    end = pb.GenerateStreamEnd()
    try:
        with closing(parts(client, request)) as coming:
            for part in coming:
                if part.WhichOneof("part") == "end":
                    end = part.end
                    continue
                texts.append(part.delta.text)
                if not as_json:
                    _write(part.delta.text)
    finally:
        if not as_json and texts:
            _write("\n")  # also before what went wrong
    text = "".join(texts)
    (sample,) = end.samples or (pb.SampleEnd(),)
    if as_json:
        print_json(_reply(text, sample, end), one_line=True)
    tell_cut(sample.finish_reason, sample.num_tokens)
    return text


def translate(
    client: Client,
    adapter: str,
    text: str,
    source: str | None,
    target: str | None,
    sampling: pb.SamplingParams,
    as_json: bool,
) -> None:
    """Write the translation of one text, or a line of JSON; raises as `show`."""
    request = pb.TranslateRequest(
        adapter=adapter,
        inputs=[pb.TextInput(text=text)],
        source_language=source,
        target_language=target,
        sampling=sampling,
    )
    reply = client.call(client.inference.Translate, request)
    (result,) = reply.results
    if as_json:
        print_json(_reply(result.text, result, reply), one_line=True)
    else:
        _write(f"{result.text}\n")
    tell_cut(result.finish_reason, result.num_tokens)


def tell_cut(reason: pb.FinishReason.ValueType, num_tokens: int) -> None:
    """Say on stderr that a text is cut; raises ControlError when the model could not go on."""
    if reason == pb.FINISH_REASON_LENGTH:
        note(f"cut after {num_tokens} tokens; --max-new-tokens allows more where the model's context does")
    elif reason == pb.FINISH_REASON_ERROR:
        raise ControlError("the model could not go on: its logits are not finite, or nothing is allowed here", REFUSED)


def _begun(client: Client, request: pb.GenerateRequest, timeout_s: float) -> tuple[Any, pb.GenerateStreamResponse]:
    call: Any = client.inference.GenerateStream(request, timeout=timeout_s)
    try:
        return call, next(call)
    except StopIteration:
        raise ControlError(f"{client.server} ended the reply before it began", REFUSED) from None
    except (KeyboardInterrupt, grpc.RpcError):
        call.cancel()
        raise


def _write(text: str) -> None:
    """To a terminal without what it would obey; to a pipe as it is."""
    typer.echo(_harmless(text) if sys.stdout.isatty() else text, nl=False)


def _harmless(text: str) -> str:
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _reply(
    text: str, end: pb.SampleEnd | pb.TranslateResult, whole: pb.GenerateStreamEnd | pb.TranslateResponse
) -> dict[str, Any]:
    """One reply for machines: the same keys for every command, numbers in seconds and tokens."""
    facts = as_dict(whole)
    return {
        "text": text,
        "finish_reason": pb.FinishReason.Name(end.finish_reason).removeprefix("FINISH_REASON_").lower(),
        "stop": end.stop if isinstance(end, pb.SampleEnd) else "",
        **{name: facts[name] for name in ("adapter", "version", "digest", "usage", "timings") if name in facts},
    }
