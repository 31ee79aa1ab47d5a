"""`multilora generate`, `translate` and `chat`: texts from a running server, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from server.control_cli import options
from server.control_cli.given import given
from server.control_cli.options import DEFAULT_SERVER, SLOW_S

generate_app = typer.Typer(add_completion=False)
translate_app = typer.Typer(add_completion=False)
chat_app = typer.Typer(add_completion=False)

_Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="NAME, NAME@VERSION or NAME@ALIAS, each also with TENANT/ before it.")
]
_Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT|-", show_default=False, help="What the model continues; - is standard input."),
]
_Text = Annotated[
    str | None, typer.Argument(metavar="TEXT|-", show_default=False, help="What to translate; - is standard input.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON for each reply.")]
_Temperature = Annotated[float | None, typer.Option(help="Higher: more varied; 0: the likeliest text.")]
_TopK = Annotated[int | None, typer.Option(help="Draw from that many best tokens; 0: all.")]
_TopP = Annotated[float | None, typer.Option(help="Draw from the best tokens that reach this probability.")]
_MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens of a reply.")]
_Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Text that ends a reply; may be repeated.")]
_Seed = Annotated[int | None, typer.Option(help="The same seed draws the same text.")]
_JsonSchema = Annotated[Path | None, typer.Option(metavar="FILE", help="JSON schema that a reply must follow.")]
_Regex = Annotated[str | None, typer.Option(metavar="REGEX", help="Regular expression that a reply must match.")]


@generate_app.command(no_args_is_help=True)
def generate(
    adapter: _Adapter,
    prompt: _Prompt = None,
    field: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A field of the adapter's prompt template, instead of PROMPT."),
    ] = None,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    max_new_tokens: _MaxNewTokens = None,
    stop: _Stop = None,
    seed: _Seed = None,
    json_schema: _JsonSchema = None,
    regex: _Regex = None,
    as_json: _Json = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
) -> None:
    """Continue a prompt with an adapter of a running server; the text appears as it comes.

    What is not given is as the adapter's files say.

    Exit code 0: done. 1: refused. 2: the command itself is wrong. 3: no server is reached. 130: interrupted.
    """
    from server.control_cli import generating  # gRPC, for the command alone

    given.set({"token_file": token_file, "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key})
    with generating.connected("generate", server, timeout) as client:
        request = generating.request_of(
            adapter,
            generating.sampling_of(temperature, top_k, top_p, max_new_tokens, stop, seed),
            generating.constraint_of(json_schema, regex),
        )
        request.inputs.append(generating.prompt_of(prompt, _list(field)))
        generating.show(client, request, as_json=as_json)


@translate_app.command(no_args_is_help=True)
def translate(
    adapter: _Adapter,
    text: _Text = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="LANGUAGE", help="Language of the text, as the adapter reads it.")
    ] = None,
    target: Annotated[str | None, typer.Option("--to", metavar="LANGUAGE", help="Language to translate into.")] = None,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    max_new_tokens: _MaxNewTokens = None,
    stop: _Stop = None,
    seed: _Seed = None,
    as_json: _Json = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
) -> None:
    """Translate a text with an adapter of a running server.

    Without --temperature, and unless the adapter's files say otherwise, the likeliest text is given.

    Exit code 0: done. 1: refused. 2: the command itself is wrong. 3: no server is reached. 130: interrupted.
    """
    from server.control_cli import generating  # gRPC, for the command alone

    given.set({"token_file": token_file, "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key})
    with generating.connected("translate", server, timeout) as client:
        sampling = generating.sampling_of(temperature, top_k, top_p, max_new_tokens, stop, seed)
        generating.translate(client, adapter, generating.text_of(text, "TEXT"), source, target, sampling, as_json)


@chat_app.command(no_args_is_help=True)
def chat(
    adapter: _Adapter,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")
    ] = None,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    max_new_tokens: _MaxNewTokens = None,
    stop: _Stop = None,
    seed: _Seed = None,
    json_schema: _JsonSchema = None,
    regex: _Regex = None,
    as_json: _Json = False,
    server: options.Server = DEFAULT_SERVER,
    timeout: options.Timeout = SLOW_S,
    token_file: options.TokenFile = None,
    tls: options.Tls = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
) -> None:
    """Talk with an adapter whose tokenizer has a chat template. Ctrl-C stops a reply, Ctrl-D ends.

    Each line is a message, and the model is sent all of the conversation. Lines of a pipe are answered one by one.

    Exit code 0: done. 1: refused. 2: the command itself is wrong. 3: no server is reached.
    """
    from server.control_cli import chatting, generating  # gRPC, for the command alone

    given.set({"token_file": token_file, "tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key})
    with generating.connected("chat", server, timeout) as client:
        request = generating.request_of(
            adapter,
            generating.sampling_of(temperature, top_k, top_p, max_new_tokens, stop, seed),
            generating.constraint_of(json_schema, regex),
        )
        chatting.converse(client, request, system, as_json=as_json)


def _list(values: Sequence[str] | None) -> list[str]:
    return [*(values or ())]
