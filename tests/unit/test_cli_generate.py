"""`multilora generate`, `translate` and `chat`: what is sent, what people and machines read, and the exit codes."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from lora_runtime.errors import AdapterNotFound, InvalidRequest, MultiloraError
from server.cli import app
from server.control_cli import client as client_module
from server.pb.multilora.v1 import inference_pb2 as pb
from server.pb.multilora.v1 import inference_pb2_grpc
from server.rpc.errors import STATUS_DETAILS_KEY, to_status

NAME = "tenants/default/adapters/writer/versions/1"


class FakeService(inference_pb2_grpc.InferenceServiceServicer):
    """Streams `texts` as one reply after the `faults`; an Event among them is waited for."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.headers: list[str] = []
        self.texts: list[Any] = ["Bonjour", " le ", "monde"]
        self.finish_reason = pb.FINISH_REASON_EOS
        self.faults: list[Any] = []
        self.late_fault: Any = None
        self.left = threading.Event()  # a client went away in the middle of a reply

    def GenerateStream(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin(request, context)
        context.add_callback(self.left.set)
        for text in self.texts:
            if isinstance(text, threading.Event):
                while not text.wait(0.01) and context.is_active():
                    pass
            else:
                yield pb.GenerateStreamResponse(delta=pb.SampleDelta(text=text))
        if self.late_fault is not None:
            self._fail(self.late_fault, context)
        sample = pb.SampleEnd(finish_reason=self.finish_reason, num_tokens=7)
        usage = pb.Usage(prompt_tokens=4, generated_tokens=7)
        end = pb.GenerateStreamEnd(adapter=NAME, version=1, digest="ab", samples=[sample], usage=usage)
        yield pb.GenerateStreamResponse(end=end)

    def Translate(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._begin(request, context)
        result = pb.TranslateResult(text="".join(self.texts), finish_reason=self.finish_reason, num_tokens=7)
        return pb.TranslateResponse(adapter=NAME, version=1, results=[result], usage=pb.Usage(generated_tokens=7))

    def _begin(self, request: Any, context: Any) -> None:
        copy = type(request)()
        copy.CopyFrom(request)
        self.requests.append(copy)
        self.headers += [value for key, value in context.invocation_metadata() if key == "authorization"]
        if self.faults:
            self._fail(self.faults.pop(0), context)

    @staticmethod
    def _fail(fault: Any, context: Any) -> None:
        if isinstance(fault, MultiloraError):
            status = to_status(fault)
            context.set_trailing_metadata(((STATUS_DETAILS_KEY, status.details),))
            context.abort(status.code, status.message)
        context.abort(fault, "")


class Cli:
    """The command, pointed at the fake."""

    def __init__(self, fake: FakeService, target: str) -> None:
        self.fake, self.target = fake, target

    def __call__(self, *arguments: str, exit_code: int = 0, **options: Any) -> Any:
        done = CliRunner(env={"MULTILORA_SERVER": self.target}).invoke(app, arguments, **options)
        assert done.exit_code == exit_code, done.output
        assert "Traceback" not in done.output
        return done

    def refused(self, *arguments: str, exit_code: int, **options: Any) -> str:
        """The one line on stderr; nothing was asked of the server."""
        num_before = len(self.fake.requests)
        done = self(*arguments, exit_code=exit_code, **options)
        assert (done.stdout, done.stderr.count("\n"), len(self.fake.requests)) == ("", 1, num_before)
        return done.stderr


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    monkeypatch.setattr(client_module, "PAUSES_S", (0.01, 0.02, 0.04))
    fake = FakeService()
    server = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Cli(fake, f"127.0.0.1:{port}")
    server.stop(None).wait()


def test_a_prompt_is_continued(cli: Cli) -> None:
    done = cli("generate", "writer", "Hello")
    assert (done.stdout, done.stderr) == ("Bonjour le monde\n", "")
    (request,) = cli.fake.requests
    assert request == pb.GenerateRequest(adapter="writer", inputs=[pb.PromptInput(text="Hello")], sampling={"n": 1})


@pytest.mark.parametrize("arguments", [("-",), ()], ids=["dash", "nothing"])
def test_a_prompt_may_come_from_standard_input(cli: Cli, arguments: tuple[str, ...]) -> None:
    for command in ("generate", "translate"):
        cli(command, "writer", *arguments, input="zwei\nZeilen\n")
    generated, translated = cli.fake.requests
    assert generated.inputs[0].text == translated.inputs[0].text == "zwei\nZeilen"


def test_every_option_is_sent(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "null"}')
    numbers = ["--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--max-new-tokens", "12", "--seed", "3"]
    given = [*numbers, "--stop", "a", "--stop", "b"]
    cli("generate", "writer", "x", *given, "--json-schema", str(tmp_path / "schema.json"))
    cli("generate", "writer", "--field", "question=who=?", "--field", "context=", "--regex", "[a-z]+")
    cli("translate", "writer", "x", *given, "--from", "German", "--to", "French")
    first, second, third = cli.fake.requests
    sampling = pb.SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=12, stop=["a", "b"], seed=3, n=1)
    assert first.sampling == third.sampling == sampling
    assert first.constraint == pb.Constraint(json_schema='{"type": "null"}')
    assert dict(second.inputs[0].fields) == {"question": "who=?", "context": ""}
    assert second.constraint == pb.Constraint(regex="[a-z]+")
    assert (third.source_language, third.target_language) == ("German", "French")


def test_json_is_one_line_a_reply(cli: Cli) -> None:
    for command in ("generate", "translate"):
        (line,) = cli(command, "writer", "x", "--json").stdout.splitlines()
        reply = json.loads(line)
        assert (reply["text"], reply["finish_reason"], reply["adapter"]) == ("Bonjour le monde", "eos", NAME)
        assert reply["usage"]["generated_tokens"] == 7
    lines = cli("chat", "writer", "--json", input="one\n\ntwo\n").stdout.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["Bonjour le monde"] * 2


def test_a_text_that_is_cut_is_told_of(cli: Cli) -> None:
    cli.fake.finish_reason = pb.FINISH_REASON_LENGTH
    for command in ("generate", "translate"):
        done = cli(command, "writer", "x")
        assert done.stdout == "Bonjour le monde\n"
        assert "cut after 7 tokens; --max-new-tokens" in done.stderr


def test_a_model_that_cannot_go_on_is_a_failure(cli: Cli) -> None:
    cli.fake.finish_reason = pb.FINISH_REASON_ERROR
    for command in ("generate", "translate"):
        assert "could not go on" in cli(command, "writer", "x", exit_code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate writer x --field a=b", "PROMPT and --field exclude each other"),
        ("generate writer --field ab", "'ab' is not NAME=VALUE"),
        ("generate writer --field a=b --field a=c", "'a' is given twice"),
        ("generate writer x --regex a --json-schema b", "--json-schema and --regex exclude each other"),
        ("generate writer x --json-schema absent.json", "absent.json cannot be read"),
        ("generate writer x --top-k 99999999999", "out of range"),
        ("generate writer x --server nowhere", "is not HOST:PORT"),
        ("translate writer x --timeout 0", "--timeout"),
        ("chat writer --token-file absent.txt", "absent.txt cannot be read"),
    ],
)
def test_a_wrong_command_asks_nothing(cli: Cli, arguments: str, words: str) -> None:
    message = cli.refused(*arguments.split(), exit_code=2)
    assert words in message
    assert message.startswith(f"multilora {arguments.split()[0]}: ")


@pytest.mark.parametrize("command", ["generate", "translate"])
@pytest.mark.parametrize(
    ("fault", "exit_code", "words"),
    [
        (AdapterNotFound("default/nws"), 1, "is not registered"),
        (InvalidRequest("sampling.top_p", "2.0 is not allowed"), 1, "sampling.top_p: 2.0 is not allowed"),
        (grpc.StatusCode.UNIMPLEMENTED, 1, "older multilora"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 1, "--max-new-tokens"),
    ],
    ids=["absent", "invalid", "old", "late"],
)
def test_a_refusal_is_one_line(cli: Cli, command: str, fault: Any, exit_code: int, words: str) -> None:
    cli.fake.faults = [fault]
    done = cli(command, "writer", "x", exit_code=exit_code)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert words in done.stderr


def test_a_reply_that_has_not_begun_is_asked_for_again(cli: Cli) -> None:
    cli.fake.faults = [grpc.StatusCode.UNAVAILABLE] * 2
    assert cli("generate", "writer", "x").stdout == "Bonjour le monde\n"
    assert len(cli.fake.requests) == 3
    assert "cannot reach" in cli("generate", "writer", "x", "--server", "127.0.0.1:1", exit_code=3).stderr


def test_a_reply_that_breaks_off_is_shown_as_far_as_it_came(cli: Cli) -> None:
    cli.fake.late_fault = grpc.StatusCode.UNAVAILABLE
    done = cli("generate", "writer", "x", exit_code=3)
    assert done.stdout == "Bonjour le monde\n"
    assert len(cli.fake.requests) == 1


def test_a_token_is_sent(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("ml_abc_secret\n")
    cli("generate", "writer", "x", "--token-file", str(tmp_path / "token"))
    assert cli.fake.headers == ["Bearer ml_abc_secret"]


def test_a_chat_keeps_what_was_said(cli: Cli) -> None:
    done = cli("chat", "writer", "--system", "brief", input="one\ntwo\n")
    assert done.stdout == "Bonjour le monde\n" * 2
    said = [
        [(message.role, message.content) for message in request.inputs[0].messages] for request in cli.fake.requests
    ]
    assert said[0] == [("system", "brief"), ("user", "one")]
    assert said[1] == [*said[0], ("assistant", "Bonjour le monde"), ("user", "two")]


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, target: str, *arguments: str) -> None:
        self._screen, keyboard = pty.openpty()
        code = f"from server.cli import app; app({list(arguments)!r})"
        environment = os.environ | {"MULTILORA_SERVER": target, "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=keyboard,
            stdout=keyboard,
            stderr=keyboard,
            env=environment,
            start_new_session=True,
        )
        os.close(keyboard)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def until(self, words: str) -> None:
        """Read what is shown until that comes; what was shown before it is forgotten."""
        ends = time.monotonic() + 30
        while words not in self.shown:
            assert time.monotonic() < ends, self.shown
            if select.select([self._screen], [], [], 0.1)[0]:
                self.shown += os.read(self._screen, 4096).decode()
        self.shown = self.shown[self.shown.index(words) + len(words) :]

    def close(self) -> int:
        code = self.process.wait(20)
        os.close(self._screen)
        return code


def test_a_chat_on_a_terminal_stops_replies_and_ends_as_told(cli: Cli) -> None:
    cli.fake.texts = ["Bon\x1b[2Jjour", threading.Event()]
    terminal = Terminal(cli.target, "chat", "writer")
    terminal.until("Ctrl-D ends")
    terminal.until("> ")
    terminal.type("one\n")
    terminal.until("Bon\\x1b[2Jjour")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.until("stopped")
    assert cli.fake.left.wait(10)
    cli.fake.texts = ["Salut"]
    terminal.until("> ")
    terminal.type("two\n")
    terminal.until("Salut")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.close() == 0
    assert [message.content for message in cli.fake.requests[-1].inputs[0].messages] == ["two"]


def test_text_appears_as_it_comes_and_ctrl_c_ends_the_work(cli: Cli) -> None:
    cli.fake.texts = ["first", threading.Event()]
    terminal = Terminal(cli.target, "generate", "writer", "x")
    terminal.until("first")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.until("interrupted")
    assert terminal.close() == 130
    assert cli.fake.left.wait(10)


def test_nothing_given_on_a_terminal_is_asked_for(cli: Cli) -> None:
    terminal = Terminal(cli.target, "generate", "writer")
    terminal.until("give a PROMPT, --field NAME=VALUE, or - to type it")
    assert terminal.close() == 2


@pytest.mark.parametrize("command", ["generate", "translate", "chat"])
def test_help_fits_a_narrow_terminal(command: str) -> None:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout
