"""`multilora adapters …` against a server: what is sent, what people and machines read, and the exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import grpc
import pytest
from typer.testing import CliRunner

from lora_runtime.errors import (
    AdapterAlreadyExists,
    AdapterInUse,
    AdapterNotFound,
    AdapterRejected,
    EngineStopped,
    MultiloraError,
    SourceUnavailable,
)
from server.cli_adapters import adapters_app
from server.control_cli import client as client_module
from server.control_cli import output, tables, watch
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.pb.multilora.v1 import adapters_pb2_grpc, common_pb2
from server.rpc.errors import STATUS_DETAILS_KEY, to_status

Fault = MultiloraError | grpc.StatusCode
HANG = threading.Event  # instead of a fault: no answer before the test is over
MIB = 1 << 20


def adapter(name: str = "news", version: int = 1, tenant: str = "default", **fields: Any) -> pb.Adapter:
    fields = {"state": pb.ADAPTER_STATE_READY, "task": common_pb2.TASK_CLASSIFY, "source": name, **fields}
    return pb.Adapter(name=f"tenants/{tenant}/adapters/{name}/versions/{version}", version=version, **fields)


def alias(name: str = "prod", **fields: Any) -> pb.Alias:
    return pb.Alias(name=f"tenants/default/adapters/news/aliases/{name}", **fields)


NEWS = adapter(
    version=2,
    labels=["World", "Sports"],
    problem_type=common_pb2.PROBLEM_TYPE_SINGLE_LABEL,
    ranks=[4, 8],
    resident_bytes=3 * MIB // 2,
    num_parameters=393_216,
    load_seconds=0.25,
    metrics={"accuracy": 0.9125},
    base_model_name="org/encoder",
    digest="ab" * 32,
    pinned=True,
    aliases=["default", "prod"],
)
BROKEN = adapter(
    "broken",
    state=pb.ADAPTER_STATE_FAILED,
    failure=pb.AdapterFailure(reason="ADAPTER_REJECTED", message="adapter_config.json: r is [0]; use a positive rank"),
)


class FakeService(adapters_pb2_grpc.AdapterServiceServicer):
    """Answers from `replies` by call, after the `faults`; streams of WatchAdapters are played from `streams`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.replies: dict[str, Any] = {
            "RegisterAdapter": pb.RegisterAdapterResponse(
                adapter=adapter(version=3, state=pb.ADAPTER_STATE_REGISTERED)
            ),
            "UploadAdapter": pb.UploadAdapterResponse(adapter=adapter(version=4, source="upload")),
            "GetAdapter": pb.GetAdapterResponse(adapter=NEWS),
            "LoadAdapter": pb.LoadAdapterResponse(adapter=NEWS),
            "UnloadAdapter": pb.UnloadAdapterResponse(adapter=NEWS, freed_bytes=3 * MIB // 2),
            "PinAdapter": pb.PinAdapterResponse(adapter=NEWS),
            "SetAlias": pb.SetAliasResponse(alias=alias(version=3, previous_version=2)),
            "DeleteAlias": pb.DeleteAliasResponse(),
            "DeleteAdapter": pb.DeleteAdapterResponse(freed_bytes=MIB, freed_disk_bytes=2 * MIB),
        }
        self.pages = [[NEWS]]
        self.faults: list[Any] = []  # of whatever is called next
        self.faults_of: dict[str, list[Any]] = {}
        self.streams: list[list[Any]] = []
        self.release = threading.Event()

    def sent(self, call: str) -> list[Any]:
        return [request for name, request in self.calls if name == call]

    def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("ListAdapters", request, context)
        number = int(request.page_token or 0)
        following = str(number + 1) if number + 1 < len(self.pages) else ""
        return pb.ListAdaptersResponse(adapters=self.pages[number], next_page_token=following)

    def UploadAdapter(self, messages: Any, context: Any) -> Any:  # noqa: N802
        received = list(messages)
        self._begin("UploadAdapter", received, context)
        if sum(len(m.data) for m in received) != sum(file.num_bytes for file in received[0].header.files):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream ended early")
        return self.replies["UploadAdapter"]

    def WatchAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin("WatchAdapters", request, context)
        for item in self.streams.pop(0) if self.streams else [AdapterNotFound("the end")]:
            if isinstance(item, pb.WatchAdaptersResponse):
                yield item
            else:
                self._fail(item, context)

    def _begin(self, call: str, request: Any, context: Any) -> None:
        self.calls.append((call, request))
        if faults := self.faults_of.get(call, self.faults):
            self._fail(faults.pop(0), context)

    def _fail(self, fault: Any, context: Any) -> None:
        """As the server does it: a typed error has details, a bare code comes from what is between."""
        if fault is HANG:
            self.release.wait(10)
        elif isinstance(fault, MultiloraError):
            status = to_status(fault)
            context.set_trailing_metadata(((STATUS_DETAILS_KEY, status.details),))
            context.abort(status.code, status.message)
        else:
            context.abort(fault, "")


def _unary(call: str) -> Any:
    def answer(self: FakeService, request: Any, context: Any) -> Any:
        self._begin(call, request, context)
        return self.replies[call]

    return answer


for _call in FakeService().replies:
    if _call != "UploadAdapter":
        setattr(FakeService, _call, _unary(_call))


class Cli:
    """The command, pointed at the fake."""

    def __init__(self, fake: FakeService, target: str) -> None:
        self.fake = fake
        self.target = target

    def __call__(self, *arguments: str, exit_code: int = 0, server: str | None = None, **options: Any) -> Any:
        done = CliRunner(env={"MULTILORA_SERVER": server or self.target}).invoke(adapters_app, arguments, **options)
        assert done.exit_code == exit_code, done.output
        if exit_code:
            assert isinstance(done.exception, SystemExit)
            assert "Traceback" not in done.output
        return done

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json").stdout)

    def refused(self, *arguments: str, exit_code: int, **options: Any) -> str:
        """The one line on stderr; stdout is empty."""
        done = self(*arguments, exit_code=exit_code, **options)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)
        return done.stderr


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    for module in (client_module, watch):
        monkeypatch.setattr(module, "PAUSES_S", (0.01, 0.02, 0.04))
    fake = FakeService()
    server = grpc.server(ThreadPoolExecutor(4))
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Cli(fake, f"127.0.0.1:{port}")
    fake.release.set()
    server.stop(None).wait()


# what people read


def test_list_is_a_table_with_reasons_and_a_summary(cli: Cli) -> None:
    cli.fake.pages = [[NEWS, BROKEN], [adapter("mail", tenant="acme", state=pb.ADAPTER_STATE_REGISTERED)]]
    lines = cli("list", "--all-tenants").stdout.splitlines()
    assert lines[0].split() == list(tables._COLUMNS)
    assert lines[1].split() == ["news", "2", "default", "prod", "ready", "classify", "2", "4", "8", "1.50", "yes"]
    assert lines[2].split()[:3] == ["broken", "1", "failed"]
    assert lines[3].strip().startswith("ADAPTER_REJECTED: adapter_config.json: r is [0]; use a positive rank")
    assert lines[4].split()[:2] == ["acme/mail", "1"]
    assert lines[5] == "3 versions: 1 ready, 1 failed, 1 registered; 1.50 MiB of device memory"


def test_list_sends_its_filters_with_every_page(cli: Cli) -> None:
    cli.fake.pages = [[NEWS], [NEWS], [NEWS]]
    filters = "--tenant", "acme", "--state", "READY", "--task", "classify_tokens", "--prefix", "ne", "--limit", "2"
    assert "there are more, raise --limit" in cli("list", *filters).stdout
    requests = cli.fake.sent("ListAdapters")
    assert [(r.page_token, r.page_size) for r in requests] == [("", 2), ("1", 1)]
    for request in requests:
        assert (request.tenant, request.name_prefix) == ("acme", "ne")
        assert (request.state, request.task) == (pb.ADAPTER_STATE_READY, common_pb2.TASK_CLASSIFY_TOKENS)


def test_an_empty_list_says_how_to_add_one(cli: Cli) -> None:
    cli.fake.pages = [[]]
    assert "register NAME SOURCE" in cli("list").stdout
    assert "of tenant acme" in cli("list", "--tenant", "acme").stdout
    assert "without --state" in cli("list", "--state", "ready").stdout
    assert cli.json("list") == {"adapters": []}


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_folds_the_table_and_loses_nothing(width: int) -> None:
    from rich.console import Console

    long = adapter(
        "a-rather-long-name-of-an-adapter", 12, "tenant", ranks=[4, 8, 16, 32], aliases=["default", "canary"]
    )
    long.task, long.resident_bytes, long.state = common_pb2.TASK_CLASSIFY_TOKENS, 123 * MIB, pb.ADAPTER_STATE_REGISTERED
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        tables.print_table(console, [long, BROKEN])
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    shown = "".join(capture.get().split())
    for words in ("registered", "123.00", "usea", "positive", "failed", "pinned", "MiB"):
        assert words in shown
    assert lines[0].split() == list(tables._COLUMNS)
    assert "…" not in shown


def test_show_tells_every_fact_and_where_aliases_lead(cli: Cli) -> None:
    aliases = [alias("default", version=2), alias(version=2, canary_version=3, canary_percent=12.5, previous_version=1)]
    cli.fake.replies["GetAdapter"] = pb.GetAdapterResponse(adapter=NEWS, aliases=aliases)
    text = cli("show", "news@prod").stdout
    assert cli.fake.sent("GetAdapter")[0].adapter == "news@prod"
    for fact in ("news@2", "2: World, Sports", "4, 8", "393,216", "1,572,864 bytes (1.50 MiB)", "accuracy 0.9125"):
        assert fact in text
    assert "prod         version 2 (87.5 % of requests), version 3 (12.5 %); before: version 1" in text


def test_show_tells_why_an_adapter_failed_and_escapes_what_terminals_obey(cli: Cli) -> None:
    failed = adapter(state=pb.ADAPTER_STATE_FAILED, labels=["\x1b[31mred", "[bold]"])
    failed.failure.message, failed.failure.retryable = "the store is down", True
    cli.fake.replies["GetAdapter"] = pb.GetAdapterResponse(adapter=failed)
    text = cli("show", "news").stdout
    assert "the store is down (the next request tries again)" in text
    assert "\\x1b[31mred, [bold]" in text
    assert "\x1b" not in text


# changes


@pytest.mark.parametrize(
    ("arguments", "call", "fields", "words"),
    [
        ("register news s3://b/n --version 3", "RegisterAdapter", {"version": 3, "source": "s3://b/n"}, "news@3"),
        ("load news", "LoadAdapter", {"adapter": "news", "wait": True}, "ready: 1.50 MiB"),
        ("load news --no-wait", "LoadAdapter", {"wait": False}, "news@2"),
        ("unload news", "UnloadAdapter", {"adapter": "news"}, "freed 1,572,864 bytes (1.50 MiB)"),
        ("pin news", "PinAdapter", {"pinned": True}, "is pinned"),
        ("unpin news", "PinAdapter", {"pinned": False}, "may be evicted"),
        ("alias news prod 3", "SetAlias", {"alias": "prod", "version": 3}, "news@prod leads to version 3; before"),
        (
            "alias news prod 3 --canary 4 --percent 2.5",
            "SetAlias",
            {"version": 3, "canary_version": 4, "canary_percent": 2.5},
            "leads to",
        ),
        ("alias news prod --rollback", "SetAlias", {"rollback": True, "version": 0}, "leads to"),
        ("alias news prod --remove", "DeleteAlias", {"adapter": "news", "alias": "prod"}, "removed"),
        ("delete news@2 --yes", "DeleteAdapter", {"adapter": "news@2"}, "2,097,152 bytes (2.00 MiB) of disk"),
    ],
)
def test_a_change_is_sent_and_told(cli: Cli, arguments: str, call: str, fields: dict[str, Any], words: str) -> None:
    assert words in cli(*arguments.split()).stdout
    (request,) = cli.fake.sent(call)
    assert {name: getattr(request, name) for name in fields} == fields
    if hasattr(request, "request_id"):
        assert UUID(request.request_id).version == 4
    assert cli.json(*arguments.split()) == output.as_dict(cli.fake.replies[call])


def test_json_has_every_key_also_of_what_is_empty(cli: Cli) -> None:
    shown = cli.json("list")["adapters"][0]
    assert (shown["state"], shown["resident_bytes"], shown["host_bytes"]) == ("ADAPTER_STATE_READY", "1572864", "0")
    assert (shown["normalize"], shown["labels"]) == (False, ["World", "Sports"])


@pytest.mark.parametrize(
    "arguments", ["register news n", "pin news", "alias news prod 3", "alias news prod --remove", "delete news@2 -y"]
)
def test_a_retry_repeats_the_request_id(cli: Cli, arguments: str) -> None:
    cli.fake.faults = [grpc.StatusCode.UNAVAILABLE, EngineStopped("stopping"), grpc.StatusCode.UNAVAILABLE]
    cli(*arguments.split())
    assert len(cli.fake.calls) == 4
    assert len({request.request_id for _, request in cli.fake.calls}) == 1
    cli(*arguments.split())
    assert len({request.request_id for _, request in cli.fake.calls}) == 2


def test_load_after_registration_is_of_that_version(cli: Cli) -> None:
    done = cli("register", "news", "news-v3", "--load")
    assert cli.fake.sent("LoadAdapter")[0].adapter.endswith("/versions/3")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["registered", "news@2"]


def test_a_refused_load_leaves_the_registration_known(cli: Cli) -> None:
    cli.fake.faults_of["LoadAdapter"] = [AdapterRejected("SHAPE", "q.lora_A", "has 3 rows, 4 are needed")]
    done = cli("register", "news", "news-v3", "--load", "--json", exit_code=1)
    assert json.loads(done.stdout)["adapter"]["version"] == 3
    assert "has 3 rows, 4 are needed" in done.stderr


def test_delete_asks_on_a_terminal_and_refuses_without_one(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--yes" in cli.refused("delete", "news@2", exit_code=2)
    monkeypatch.setattr("server.control_cli.naming.is_interactive", lambda: True)
    assert "nothing was deleted" in cli("delete", "news@2", input="n\n", exit_code=1).stderr
    assert cli.fake.calls == []
    assert "deleted news@2" in cli("delete", "news@2", input="y\n").stdout
    assert len(cli.fake.calls) == 1


# uploads


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": bytes(range(256)) * 10_000,  # 2.4 MiB: three pieces
        "tokenizer.json": b"",
        "1_Pooling/config.json": b"[1]",
        "README.md": b"#",
        "adapter_model.bin": b"pickle",
        "vocab.pkl": b"pickle",
        "checkpoint-1/adapter_config.json": b"{}",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_upload_sends_the_files_of_an_adapter_in_order_with_their_hashes(cli: Cli, folder: Path) -> None:
    done = cli("upload", "acme/news", str(folder), "--version", "4")
    header, *rest = cli.fake.sent("UploadAdapter")[0]
    files = list(header.header.files)
    assert (header.header.name, header.header.version) == ("acme/news", 4)
    names = ["1_Pooling/config.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert [file.path for file in files] == names
    data = b"".join(message.data for message in rest)
    assert max(len(message.data) for message in rest) == MIB
    for file in files:
        content, data = data[: file.num_bytes], data[file.num_bytes :]
        assert content == (folder / file.path).read_bytes()
        assert file.sha256 == hashlib.sha256(content).hexdigest()
    assert data == b""
    assert f"sending {', '.join(names)}" in done.stderr
    assert "skipped README.md, adapter_model.bin, checkpoint-1/, vocab.pkl" in done.stderr
    assert "registered news@4 from upload" in done.stdout


def test_upload_starts_over_with_the_same_request_id(cli: Cli, folder: Path) -> None:
    cli.fake.faults = [grpc.StatusCode.UNAVAILABLE]
    assert cli.json("upload", "news", str(folder))["adapter"]["version"] == 4
    first, second = cli.fake.sent("UploadAdapter")
    assert first == second
    assert UUID(first[0].header.request_id).version == 4
    assert not first[0].header.HasField("version")


def test_what_is_no_adapter_is_not_sent(cli: Cli, folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    assert f"upload {folder / 'checkpoint-1'}" in cli.refused("upload", "news", str(folder), exit_code=2)
    assert "no adapter_model.safetensors" in cli.refused("upload", "news", str(folder / "checkpoint-1"), exit_code=2)
    assert "is not there" in cli.refused("upload", "news", str(folder / "absent"), exit_code=2)
    assert cli.fake.calls == []


def test_a_file_that_shrinks_while_it_is_sent_ends_the_upload(cli: Cli, folder: Path, monkeypatch: Any) -> None:
    from server.control_cli import upload

    describe = upload._describe

    def too_long(home: Path, name: str) -> pb.UploadFile:
        file = describe(home, name)
        return pb.UploadFile(path=file.path, num_bytes=file.num_bytes + 1, sha256=file.sha256)

    monkeypatch.setattr(upload, "_describe", too_long)
    assert "became shorter" in cli("upload", "news", str(folder), exit_code=2).stderr


# errors


@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [
        (AdapterNotFound("default/nws"), 1, "is not registered; register it first or check the name"),
        (AdapterAlreadyExists("default/news@3"), 1, "register a new version"),
        (AdapterInUse("default/news@2", "is pinned;\nunpin it first"), 1, "is pinned;\\nunpin it first"),
        (SourceUnavailable("s3://b/n", "timed out"), 1, "s3://b/n: timed out"),
        (EngineStopped("the server is stopping"), 3, "the server is stopping"),
        (grpc.StatusCode.UNIMPLEMENTED, 1, "does not offer this"),
        (grpc.StatusCode.PERMISSION_DENIED, 1, "PERMISSION_DENIED"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 1, "--timeout waits longer"),
    ],
)
def test_an_error_is_one_line_with_the_servers_remedy(cli: Cli, fault: Fault, exit_code: int, words: str) -> None:
    cli.fake.faults = [fault] * 4
    line = cli.refused("load", "news", "--json", exit_code=exit_code)
    assert line.startswith("multilora adapters load: ")
    assert words in line


@pytest.mark.parametrize("command", ["list", "watch", "load news", "delete news@1 --yes"])
def test_no_server_is_exit_3(cli: Cli, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        target = f"127.0.0.1:{closed.getsockname()[1]}"
    line = cli.refused(*command.split(), exit_code=3, server=target)
    assert f"cannot reach {target}; is the server running? (multilora serve; with TLS it needs --tls-ca)" in line


def test_an_answer_that_takes_too_long_names_the_timeout(cli: Cli) -> None:
    cli.fake.faults = [HANG]
    assert "within 0.2 s" in cli.refused("show", "news", "--timeout", "0.2", exit_code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("list --state warm", "registered, fetching"),
        ("list --task sing", "classify_tokens"),
        ("list --tenant a --all-tenants", "exclude each other"),
        ("list --server localhost", "is not HOST:PORT"),
        ("list --server http://localhost:1", "is not HOST:PORT"),
        ("list --timeout nan", "--timeout"),
        ("show news\udcff", "is not valid UTF-8"),
        ("alias news prod", "give a VERSION"),
        ("alias news prod 3 --remove", "only one"),
        ("alias news prod 3 --canary 4", "go together"),
        ("alias news prod --rollback --canary 4 --percent 3", "go together"),
        ("delete news --yes", "names no version"),
        ("delete news@prod --yes", "names no version"),
    ],
)
def test_a_wrong_command_is_exit_2_and_sends_nothing(cli: Cli, arguments: str, words: str) -> None:
    assert words in cli.refused(*arguments.split(), exit_code=2)
    assert cli.fake.calls == []


# watching


def change(token: str = "", **fields: Any) -> pb.WatchAdaptersResponse:
    return pb.WatchAdaptersResponse(resume_token=token, **fields)


def a_stream_of_changes() -> list[Any]:
    return [
        change(adapter=NEWS),
        change("t1", snapshot_complete=True),
        change("t2", adapter=BROKEN),
        change("t3", alias=alias(version=3)),
        change("t4", deleted_alias="tenants/default/adapters/news/aliases/prod"),
        change("t5", deleted_adapter="tenants/acme/adapters/news/versions/1"),
    ]


def test_watch_prints_a_line_a_change(cli: Cli) -> None:
    cli.fake.streams = [[*a_stream_of_changes(), AdapterNotFound("x")]]
    done = cli("watch", "--all-tenants", exit_code=1)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert all(len(time) == 8 for time, _ in lines)
    texts = [text for _, text in lines]
    assert texts[0] == "news@2  ready  1.50 MiB  pinned"
    assert "r is [0]; use a positive rank" in texts[2]
    assert texts[3:] == ["news@prod  leads to version 3", "news@prod  alias removed", "acme/news@1  deleted"]
    assert cli.fake.calls[0][1].tenant == "-"


@pytest.mark.parametrize("fault", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, None])
def test_watch_resumes_where_it_was(cli: Cli, fault: Fault | None) -> None:
    broken = a_stream_of_changes() + ([fault] if fault else [])
    cli.fake.streams = [broken, [change("t6", adapter=NEWS), AdapterNotFound("x")]]
    done = cli("watch", "--no-snapshot", "--json", exit_code=1)
    shown = [json.loads(line) for line in done.stdout.splitlines()]
    assert [change["resume_token"] for change in shown] == ["t2", "t3", "t4", "t5", "t6"]
    assert [request.resume_token for _, request in cli.fake.calls] == ["", "t5"]
    assert cli.target in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 2


def test_watch_says_when_the_past_is_lost_and_shows_what_there_is(cli: Cli) -> None:
    cli.fake.streams = [[*a_stream_of_changes(), EngineStopped("the server is stopping")]]
    cli.fake.streams.append([*a_stream_of_changes(), AdapterNotFound("x")])
    done = cli("watch", "--no-snapshot", exit_code=1)
    assert len(done.stdout.splitlines()) == 4 + 6
    assert "what there is now follows" in done.stderr


def test_watch_gives_up_when_the_server_stays_away(cli: Cli) -> None:
    cli.fake.streams = [a_stream_of_changes()] + [[grpc.StatusCode.UNAVAILABLE]] * 50
    done = cli("watch", "--timeout", "0.2", exit_code=3)
    assert "cannot reach" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("command", "exit_code"), [("watch", 0), ("show news", 130), ("upload news .", 130)])
def test_ctrl_c_ends_without_a_traceback(cli: Cli, folder: Path, command: str, exit_code: int) -> None:
    cli.fake.faults_of = {"GetAdapter": [HANG], "UploadAdapter": [HANG]}
    cli.fake.streams = [[change("t", adapter=NEWS), HANG]]
    program = [sys.executable, "-c", "from server.cli import app; app()", "adapters", *command.split()]
    environ = {**os.environ, "PYTHONPATH": os.getcwd(), "MULTILORA_SERVER": cli.target}
    pipe = subprocess.PIPE
    with subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, cwd=folder, env=environ) as process:
        deadline = time.monotonic() + 10
        while not cli.fake.calls and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # for what was streamed to arrive
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=10)
    assert process.returncode == exit_code
    assert "Traceback" not in errors
    assert "news@2  ready" in printed if command == "watch" else errors.endswith("interrupted\n")


def test_inspect_and_help_do_not_import_grpc() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from server.cli import app\n"
        "for words in (['--help'], ['adapters', 'inspect', '--help']): CliRunner().invoke(app, words)\n"
        "print('grpc' in sys.modules)\n"
        "print(CliRunner().invoke(app, ['adapters', '--help']).output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
    for command in ("inspect", "list", "upload", "watch"):
        assert f" {command} " in done.stdout
