"""The table of adapters, and all facts of one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from server.control_cli import output
from server.control_cli.output import counted, mib, plain
from server.pb.multilora.v1 import adapters_pb2

_COLUMNS = ("adapter", "ver", "aliases", "state", "task", "labels", "ranks", "MiB", "pinned")
_RIGHT = ("ver", "labels", "MiB")
_STATE = _COLUMNS.index("state")
_SHRINK = {"adapter": 10, "aliases": 7, "task": 8, "ranks": 5}  # least width of those that fold on a narrow terminal
_GAP = 2
_MAX_LABELS = 50


def print_table(console: Console, adapters: Sequence[adapters_pb2.Adapter]) -> None:
    """One row a version; a refused one has its reason below."""
    rows = [_row(adapter) for adapter in adapters]
    widths = _widths([_COLUMNS, *rows], console.width)
    part = _part(widths)
    part.add_row(*(f"[bold]{name}[/]" for name in _COLUMNS))
    for adapter, row in zip(adapters, rows, strict=True):
        cells = [plain(cell) for cell in row]
        cells[_STATE] = output.coloured_state(row[_STATE])
        part.add_row(*cells)
        if adapter.HasField("failure"):  # the reason goes across the columns, which a row of the table cannot
            console.print(part)
            console.print(Padding(f"[red]{plain(output.failure_of(adapter))}[/]", (0, 0, 0, 2), expand=False))
            part = _part(widths)
    if part.row_count:
        console.print(part)


def summary(adapters: Sequence[adapters_pb2.Adapter], *, is_cut: bool) -> str:
    """How many versions there are in each state, and what they hold."""
    states = Counter(output.state_of(adapter) for adapter in adapters)
    parts = ", ".join(f"{count:,} {state}" for state, count in states.most_common())
    resident = mib(sum(adapter.resident_bytes for adapter in adapters))
    more = "; there are more, raise --limit" if is_cut else ""
    return f"{counted(len(adapters), 'version')}: {parts}; {resident} of device memory{more}"


def print_facts(console: Console, reply: adapters_pb2.GetAdapterResponse) -> None:
    """Everything known of one version, one fact a line, then the aliases of its adapter."""
    adapter = reply.adapter
    console.print(f"[bold]{plain(output.short_name(adapter.name))}[/]")
    _print_fact(console, "state", output.coloured_state(output.state_of(adapter)))
    if adapter.HasField("failure"):
        _print_fact(console, "failure", f"[red]{plain(output.failure_of(adapter))}[/]")
    for name, value in (*_what_it_is(adapter), *_what_it_holds(adapter), *_where_it_is_from(adapter)):
        if value:
            _print_fact(console, name, plain(value))
    if reply.aliases:
        adapter_name = output.short_name(adapter.name).partition("@")[0]
        console.print(f"[bold]aliases of {plain(adapter_name)}[/]")
        for alias in reply.aliases:
            _print_fact(console, alias.name.rpartition("/")[2], plain(alias_target(alias)))


def alias_target(alias: adapters_pb2.Alias) -> str:
    """Where an alias leads and, of a weighted one, with which shares."""
    text = f"version {alias.version}"
    if alias.canary_version:
        rest, share = 100 - alias.canary_percent, alias.canary_percent
        text += f" ({rest:g} % of requests), version {alias.canary_version} ({share:g} %)"
    return f"{text}; before: version {alias.previous_version}" if alias.previous_version else text


def _print_fact(console: Console, name: str, markup: str) -> None:
    console.print(f"  {plain(name):<12} {markup}", soft_wrap=True)


def _row(adapter: adapters_pb2.Adapter) -> tuple[str, ...]:
    return (
        output.short_name(adapter.name).partition("@")[0],
        str(adapter.version),
        " ".join(adapter.aliases),
        output.state_of(adapter),
        output.task_of(adapter),
        str(len(adapter.labels) or ""),
        " ".join(map(str, adapter.ranks)),
        f"{adapter.resident_bytes / 2**20:.2f}" if adapter.resident_bytes else "0",
        "yes" if adapter.pinned else "",
    )


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Of each column: what its cells need, less where that is wider than the terminal."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    least = [_SHRINK.get(name, wanted) for name, wanted in zip(_COLUMNS, widths, strict=True)]
    excess = sum(widths) + _GAP * (len(widths) - 1) - width
    for _ in range(max(0, excess)):
        spare = [wanted - minimum for wanted, minimum in zip(widths, least, strict=True)]
        widest = max(range(len(widths)), key=lambda i: widths[i] if spare[i] > 0 else 0)
        if spare[widest] <= 0:
            break
        widths[widest] -= 1
    return widths


def _part(widths: Sequence[int]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, _GAP, 0, 0), pad_edge=False)
    for name, width in zip(_COLUMNS, widths, strict=True):
        table.add_column(width=width, overflow="fold", justify="right" if name in _RIGHT else "left")
    return table


def _what_it_is(adapter: adapters_pb2.Adapter) -> list[tuple[str, str]]:
    more = len(adapter.labels) - _MAX_LABELS
    labels = ", ".join(adapter.labels[:_MAX_LABELS]) + (f", and {more:,} more; --json lists all" if more > 0 else "")
    pooling = output.pooling_of(adapter)
    return [
        ("aliases", ", ".join(adapter.aliases) or "none"),
        ("task", output.task_of(adapter) or "not known before it is loaded"),
        ("labels", f"{len(adapter.labels)}: {labels}" if adapter.labels else ""),
        ("scores", output.problem_type_of(adapter)),
        ("pooling", pooling and f"{pooling}, {'normalised' if adapter.normalize else 'not normalised'}"),
        ("max length", f"{adapter.max_length} tokens" if adapter.HasField("max_length") else "what the base allows"),
        ("tokenizer", "its own" if adapter.own_tokenizer else "the base's"),
    ]


def _what_it_holds(adapter: adapters_pb2.Adapter) -> list[tuple[str, str]]:
    loaded = f"in {adapter.load_seconds:.3g} s, the last time" if adapter.HasField("load_seconds") else "never"
    return [
        ("ranks", ", ".join(map(str, adapter.ranks))),
        ("parameters", f"{adapter.num_parameters:,}" if adapter.num_parameters else ""),
        ("device", output.bytes_and_mib(adapter.resident_bytes)),
        ("host", output.bytes_and_mib(adapter.host_bytes)),
        ("pinned", "yes" if adapter.pinned else "no"),
        ("loaded", loaded),
    ]


def _where_it_is_from(adapter: adapters_pb2.Adapter) -> list[tuple[str, str]]:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(adapter.metrics.items()))
    return [
        ("source", adapter.source),
        ("digest", adapter.digest),
        ("trained on", adapter.base_model_name),
        ("metrics", metrics),
        ("resource", adapter.name),
    ]
