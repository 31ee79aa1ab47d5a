"""How `multilora adapters …` shows who it is: what a server gets, and what people read when a file is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from typer.testing import CliRunner

from server.cli_adapters import adapters_app
from server.pb.multilora.v1 import adapters_pb2 as pb
from server.pb.multilora.v1 import adapters_pb2_grpc


class Service(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self) -> None:
        self.headers: list[str] = []
        self.names: list[Any] = []

    def ListAdapters(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.headers += [value for key, value in context.invocation_metadata() if key == "authorization"]
        self.names += context.auth_context().get("x509_common_name", [])
        return pb.ListAdaptersResponse()


@pytest.fixture
def service() -> Iterator[tuple[Service, grpc.Server]]:
    server, service = grpc.server(ThreadPoolExecutor(2)), Service()
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
    yield service, server
    server.stop(None)


def run(target: str, *before: str, **env: str) -> Any:
    return CliRunner(env=env).invoke(adapters_app, [*before, "list", "--server", target, "--timeout", "10"])


def test_a_token_comes_from_a_file_or_a_variable_and_never_from_the_command_line(
    service: tuple[Service, grpc.Server], tmp_path: Path
) -> None:
    known, server = service
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    (tmp_path / "token").write_text("ml_abc_secret\n")
    assert run(target, "--token-file", str(tmp_path / "token")).exit_code == 0
    assert run(target, MULTILORA_TOKEN="ml_other").exit_code == 0
    assert run(target).exit_code == 0
    assert known.headers == ["Bearer ml_abc_secret", "Bearer ml_other"]


def test_tls_with_a_client_certificate(service: tuple[Service, grpc.Server], tmp_path: Path) -> None:
    known, server = service
    ca = trustme.CA()
    ours, theirs = ca.issue_cert("localhost"), ca.issue_cert("acme.example", common_name="acme")
    credentials = grpc.ssl_server_credentials(
        [(ours.private_key_pem.bytes(), ours.cert_chain_pems[0].bytes())], ca.cert_pem.bytes(), True
    )
    target = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    server.start()
    paths = {name: tmp_path / name for name in ("ca", "cert", "key")}
    ca.cert_pem.write_to_path(paths["ca"])
    theirs.cert_chain_pems[0].write_to_path(paths["cert"])
    theirs.private_key_pem.write_to_path(paths["key"])
    options = ("--tls-ca", str(paths["ca"]), "--tls-cert", str(paths["cert"]), "--tls-key", str(paths["key"]))
    assert run(target, *options).exit_code == 0
    assert known.names == [b"acme"]
    without = run(target, "--tls-ca", str(paths["ca"]))
    assert (without.exit_code, "TLS handshake" in without.output) == (3, True), "the server wants a certificate"
    assert "--tls-cert" in without.output


def trusting(folder: Path, ca: trustme.CA) -> tuple[str, str]:
    ca.cert_pem.write_to_path(folder / "trusted")
    return "--tls-ca", str(folder / "trusted")


CASES = {  # whose certificate the server has (None: it speaks no TLS), whether we trust its CA, and what is said
    "not trusted": ("localhost", False, True, "failed: the server's certificate is not trusted (unable to get local"),
    "another host": ("elsewhere.example", True, True, "failed: the server's certificate is for another host"),
    "no TLS there": (None, True, True, "failed: the server does not speak TLS; leave out --tls"),
    "no TLS here": ("localhost", True, False, "closed the connection, as a server does that speaks TLS alone"),
}


@pytest.mark.parametrize(("host", "is_trusted", "uses_tls", "message"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("command", ["list", "watch"])
def test_a_fault_of_tls_is_told_as_one(
    service: tuple[Service, grpc.Server],
    tmp_path: Path,
    host: str | None,
    is_trusted: bool,
    uses_tls: bool,
    message: str,
    command: str,
) -> None:
    _, server = service
    ca = trustme.CA()
    if host is None:
        target = f"localhost:{server.add_insecure_port('localhost:0')}"
    else:
        ours = ca.issue_cert(host)
        pair = ours.private_key_pem.bytes(), ours.cert_chain_pems[0].bytes()
        target = f"localhost:{server.add_secure_port('localhost:0', grpc.ssl_server_credentials([pair]))}"
    server.start()
    options = trusting(tmp_path, ca if is_trusted else trustme.CA()) if uses_tls else ()
    done = CliRunner().invoke(adapters_app, [*options, command, "--server", target])
    assert (done.exit_code, message in done.output) == (3, True), done.output
    assert "cannot reach" not in done.output
    assert "--tls" in done.output or "--server" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--token-file", "absent"), "--token-file: absent cannot be read"),
        (("--tls-ca", "absent"), "--tls-ca: absent cannot be read"),
        (("--tls-cert", "absent"), "--tls-cert and --tls-key go together"),
    ],
)
def test_a_wrong_option_is_named(options: tuple[str, str], message: str) -> None:
    done = run("127.0.0.1:1", *options)
    assert (done.exit_code, message in done.output) == (2, True), done.output


def test_a_token_that_is_none_is_refused_without_being_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("two words")
    done = run("127.0.0.1:1", "--token-file", str(tmp_path / "token"))
    assert done.exit_code == 2
    assert "no key or token" in done.output
    assert "two words" not in done.output
