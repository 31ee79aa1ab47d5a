"""The command line: `serve` here, other commands in modules of their own, imported when they are called."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from server.collector import exempt_from_collection
from server.settings import ServeSettings, SettingsError, flag_of, resolve_settings, variable_of

# command → where its typer app lives; each brings its own dependencies, which `serve` must not pay for
LAZY_COMMANDS = {
    "train": "server.cli_train:train_app",
    "extract": "server.cli_svd:extract_app",
    "compress": "server.cli_svd:compress_app",
    "bench": "server.cli_bench:bench_app",
    "tune": "server.cli_tune:tune_app",
    "demo": "server.cli_demo:demo_app",
    "adapters": "server.cli_adapters:adapters_app",
    "keys": "server.cli_keys:keys_app",
    "generate": "server.cli_generate:generate_app",
    "translate": "server.cli_generate:translate_app",
    "chat": "server.cli_generate:chat_app",
}


class LazyGroup(TyperGroup):
    """Imports the commands of LAZY_COMMANDS when they are used or listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *LAZY_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in LAZY_COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = LAZY_COMMANDS[cmd_name].partition(":")
        command = get_command(getattr(importlib.import_module(module), attribute))
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=LazyGroup,
    help="One resident base model, many LoRA adapters, one gRPC server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"multilora {metadata.version('multilora')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[  # its callback does the work
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Keeps `serve` a sub-command while it is the only one defined here."""


def _flag(setting: str) -> Any:
    """The option of one setting; its help, default and variable come from the setting itself."""
    field = ServeSettings.model_fields[setting]
    default = "" if field.is_required() or field.default in (None, ()) else f" Default: {field.default}."
    if field.annotation is bool:
        default = f" yes or no. Default: {'yes' if field.default else 'no'}."
    return typer.Option(flag_of(setting), help=f"{field.description}{default} [{variable_of(setting)}]")


@app.command()
def serve(
    base: Annotated[str | None, _flag("base")] = None,
    gguf_file: Annotated[str | None, _flag("gguf_file")] = None,
    adapters: Annotated[str | None, _flag("adapters")] = None,
    state: Annotated[Path | None, _flag("state")] = None,
    sources: Annotated[str | None, _flag("sources")] = None,
    auth: Annotated[str | None, _flag("auth")] = None,
    tls_cert: Annotated[Path | None, _flag("tls_cert")] = None,
    tls_key: Annotated[Path | None, _flag("tls_key")] = None,
    tls_client_ca: Annotated[Path | None, _flag("tls_client_ca")] = None,
    audit_log: Annotated[Path | None, _flag("audit_log")] = None,
    reflection: Annotated[str | None, _flag("reflection")] = None,
    health: Annotated[str | None, _flag("health")] = None,
    refuse_early: Annotated[str | None, _flag("refuse_early")] = None,
    host: Annotated[str | None, _flag("host")] = None,
    port: Annotated[int | None, _flag("port")] = None,
    metrics_host: Annotated[str | None, _flag("metrics_host")] = None,
    metrics_port: Annotated[int | None, _flag("metrics_port")] = None,
    busiest_adapters: Annotated[int | None, _flag("busiest_adapters")] = None,
    stall_seconds: Annotated[float | None, _flag("stall_seconds")] = None,
    preload: Annotated[str | None, _flag("preload")] = None,
    threads: Annotated[int | None, _flag("threads")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    dtype: Annotated[str | None, _flag("dtype")] = None,
    lora_backend: Annotated[str | None, _flag("lora_backend")] = None,
    graph_mib: Annotated[int | None, _flag("graph_mib")] = None,
    host_mib: Annotated[int | None, _flag("host_mib")] = None,
    kv_mib: Annotated[int | None, _flag("kv_mib")] = None,
    prefix_cache: Annotated[str | None, _flag("prefix_cache")] = None,
    prepack: Annotated[str | None, _flag("prepack")] = None,
    quantize: Annotated[str | None, _flag("quantize")] = None,
    tokenizer_threads: Annotated[int | None, _flag("tokenizer_threads")] = None,
    loader_threads: Annotated[int | None, _flag("loader_threads")] = None,
    arena_mib: Annotated[int | None, _flag("arena_mib")] = None,
    cache_mib: Annotated[int | None, _flag("cache_mib")] = None,
    max_upload_mib: Annotated[int | None, _flag("max_upload_mib")] = None,
    watch_seconds: Annotated[float | None, _flag("watch_seconds")] = None,
    token_budget: Annotated[int | None, _flag("token_budget")] = None,
    beside_tokens: Annotated[int | None, _flag("beside_tokens")] = None,
    max_batch_sequences: Annotated[int | None, _flag("max_batch_sequences")] = None,
    max_inputs: Annotated[int | None, _flag("max_inputs")] = None,
    max_input_chars: Annotated[int | None, _flag("max_input_chars")] = None,
    max_new_tokens: Annotated[int | None, _flag("max_new_tokens")] = None,
    stream_stall_seconds: Annotated[float | None, _flag("stream_stall_seconds")] = None,
    max_queued_sequences: Annotated[int | None, _flag("max_queued_sequences")] = None,
    max_message_mib: Annotated[int | None, _flag("max_message_mib")] = None,
    grace: Annotated[float | None, _flag("grace")] = None,
    drain_delay: Annotated[float | None, _flag("drain_delay")] = None,
    connection_age: Annotated[float | None, _flag("connection_age")] = None,
    log_level: Annotated[str | None, _flag("log_level")] = None,
    log_format: Annotated[str | None, _flag("log_format")] = None,
    access_log: Annotated[str | None, _flag("access_log")] = None,
) -> None:
    """Serve a folder of adapters over gRPC, all from one base model.

    Each flag can also be set by the variable named with it; a flag wins over its variable.
    """
    flags = dict(locals())
    try:
        settings = resolve_settings(flags, os.environ)
    except SettingsError as error:
        typer.echo(f"multilora serve: {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(run_server(settings))


def run_server(settings: ServeSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    # imported here: gRPC's start-up is not for `--help`
    from server.app import App, EngineFailed
    from server.logs import configure, log_loop_failure
    from server.startup import StartupError

    configure(settings.log_level, settings.log_format, settings.access_log)

    async def serve_until_signal() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_failure)

        def begin_stop() -> None:
            # a second signal then has its usual effect: the process ends at once
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, begin_stop)
        await App(settings).run(stop, typer.echo, exempt_from_collection)

    try:
        asyncio.run(serve_until_signal())
    except (StartupError, EngineFailed) as error:
        typer.echo(f"multilora serve: {error}", err=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":  # torchrun and `accelerate launch` start modules: -m server.cli train …
    app()
