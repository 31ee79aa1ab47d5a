"""deploy/docker: images and compose files are sound, and say what the server says. No engine is needed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from server.settings import ServeSettings, resolve_settings
from tests.service.fake_runtime import write_adapter
from tests.service.harness import HealthStatus, running

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = re.sub(r"\\\n\s*", " ", (DOCKER / "Dockerfile").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVER = SERVICES["server"]
IMAGE_ENVIRONMENT = dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.+)", DOCKERFILE, re.MULTILINE))))
DEFAULTS = {name: field.default for name, field in ServeSettings.model_fields.items()}
LOCKS = {path.stem: path.read_text() for path in DOCKER.glob("requirements-*.txt")}

each_service = pytest.mark.parametrize("name", SERVICES)


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found is not None, f"{name} is missing: pip install -e '.[test]'"
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=DOCKER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    run(tool("hadolint"), "--failure-threshold", "style", "Dockerfile")


def test_the_compose_files_follow_their_schema() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml", "compose.cuda.yaml")


def test_what_the_images_are_made_of_is_there_and_sent_to_the_builder() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [s for line in re.findall(r"^COPY (?!--from)(.+)", DOCKERFILE, re.MULTILINE) for s in line.split()[:-1]]
    assert len(sources) == 8
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{re.sub(r'-(build|cpu|cuda).txt$', '-*.txt', source)}" in sent
    assert sent[1] == "*", "what is not named stays out"


def test_the_images_run_as_a_number_that_is_not_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    images = [stage for stage in stages if stage.startswith("runtime AS ")]
    assert [stage.split()[2] for stage in images] == ["cuda", "cpu"], "the last is built where none is named"
    for stage in images:
        user = re.findall(r"^USER (\d+):(\d+)", stage, re.MULTILINE)[-1]
        assert user == ("10001", "10001")
        assert stage.rstrip().endswith("USER 10001:10001"), "nothing follows that root did"


@pytest.mark.parametrize("name", ["requirements-cpu", "requirements-cuda", "requirements-build"])
def test_every_locked_package_has_a_hash(name: str) -> None:
    entries = re.split(r"^(?=\S)", LOCKS[name], flags=re.MULTILINE)[1:]
    assert entries and all(re.match(r"[a-z0-9-]+==\S+", entry) and "--hash=sha256:" in entry for entry in entries)


@pytest.mark.parametrize(("image", "extras"), [("cpu", ()), ("cuda", ("gpu", "quantized"))])
def test_the_locks_are_of_what_the_project_asks_for(image: str, extras: tuple[str, ...]) -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCKS[f"requirements-{image}"], re.MULTILINE))
    if image == "cpu":
        assert locked.keys().isdisjoint({"torch", "triton"}) and not re.search(
            "^(nvidia|cuda)", "\n".join(locked), re.M
        )
        locked["torch"] = re.search(r"^ARG TORCH=(\S+)", DOCKERFILE, re.MULTILINE)[1]  # pyright: ignore
        cuda = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCKS["requirements-cuda"], re.MULTILINE))
        assert locked.items() <= cuda.items(), "both images have the same releases"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in ("s3", "gs", "http", "constrained", "gguf", *extras):
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[requirement.name.lower()]), f"{requirement}: run lock.sh"


def test_the_image_asks_for_the_settings_that_there_are() -> None:
    ours = {name for name in IMAGE_ENVIRONMENT if name.startswith("MULTILORA_")}
    assert {name.removeprefix("MULTILORA_").lower() for name in ours} <= DEFAULTS.keys()
    assert int(IMAGE_ENVIRONMENT["MULTILORA_METRICS_PORT"]) == DEFAULTS["metrics_port"]
    assert re.findall(r"^EXPOSE (.+)", DOCKERFILE, re.MULTILINE) == [f"{DEFAULTS['port']} {DEFAULTS['metrics_port']}"]
    volume = re.search(r"^VOLUME (\S+)", DOCKERFILE, re.MULTILINE)[1]  # pyright: ignore
    for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR", "MULTILORA_STATE"):
        assert IMAGE_ENVIRONMENT[name].startswith(volume), "the rest of the file system may be read-only"


async def test_the_health_check_says_whether_the_server_is_ready(tmp_path: Path) -> None:
    command = json.loads(re.search(r"^HEALTHCHECK .*CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[1])  # pyright: ignore
    write_adapter(tmp_path / "spam", labels=["ham", "spam"])
    hold = threading.Event()

    async def probe(port: int) -> int:
        environment = {"MULTILORA_METRICS_PORT": str(port)}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command[1:], env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait()

    async with running(tmp_path, hold_base=hold) as server:
        assert await probe(server.app.metrics_port) == 1
        hold.set()
        await server.until_health(HealthStatus.SERVING)
        assert await probe(server.app.metrics_port) == 0


def test_the_server_of_compose_is_told_what_it_understands() -> None:
    verb, *flags = SERVER["command"]
    assert verb == "serve"
    given = {flag.removeprefix("--").replace("-", "_"): value for flag, value in (one.split("=", 1) for one in flags)}
    settings = resolve_settings(given, IMAGE_ENVIRONMENT)
    assert settings.host == "0.0.0.0" and settings.auth != "none"
    assert float(SERVER["stop_grace_period"].removesuffix("s")) > settings.grace + settings.drain_delay
    ours = {name for name in SERVER["environment"] if name.startswith("MULTILORA_")}
    assert {name.removeprefix("MULTILORA_").lower() for name in ours} <= DEFAULTS.keys()
    tested = (ROOT / "tests/service/test_source_s3.py").read_text()
    assert all(f'"{name}"' in tested for name in SERVER["environment"] if name.startswith("AWS_"))
    auth = tomllib.loads((DOCKER / "auth.toml").read_text())
    assert f"./auth.toml:{settings.auth}:ro" in SERVER["volumes"]
    assert Path(auth["keys"]["file"]).is_relative_to("/var/lib/multilora")


@each_service
def test_every_file_that_is_mounted_is_there(name: str) -> None:
    for mount in SERVICES[name]["volumes"]:
        source = re.sub(r"^\$\{.+?\}", "ADAPTERS", mount).split(":")[0]
        if source.startswith("."):
            assert (DOCKER / source).exists(), mount
        else:
            assert source in COMPOSE["volumes"] or source == "ADAPTERS"


@each_service
def test_a_container_may_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert re.search(r":[^/:]*\d[^/:]*$", service["image"]) or name == "server", "a release, not whatever is the latest"


def test_no_secret_has_a_value_here() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    named = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / "env.example").read_text(), re.MULTILINE))
    assert named == dict.fromkeys(asked, "")
    for service in SERVICES.values():
        for variable, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|SECRET|TOKEN|MC_HOST", variable) or "${" in value
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_prometheus_reads_the_server_and_the_rules() -> None:
    prometheus = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["prometheus"]["volumes"]}
    assert [Path(mounted[path]).name for path in prometheus["rule_files"]] == ["multilora.rules.yaml"]
    assert (
        f"--config.file={next(path for path in mounted if path.endswith('prometheus.yaml'))}"
        in SERVICES["prometheus"]["command"]
    )
    (scrape,) = prometheus["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"server:{DEFAULTS['metrics_port']}"]}]
    assert {"inside"} <= set(SERVER["networks"]) & set(SERVICES["prometheus"]["networks"])
    assert [port.split(":")[-1] for port in SERVER["ports"]] == [str(DEFAULTS["port"])], "/metrics is not published"


def test_grafana_finds_what_compose_mounts() -> None:
    grafana = SERVICES["grafana"]
    mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in grafana["volumes"]}
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "multilora.yaml").read_text())["providers"]
    assert mounted[provider["options"]["path"]] == "../grafana/dashboards"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DOCKER / mounted[str(home.parent)] / home.name).is_file()
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "$PROMETHEUS_URL"
    prometheus = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    assert SERVICES["prometheus"]["ports"][0].endswith(":9090")


def test_the_gpu_is_asked_for_beside_all_else() -> None:
    more = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())["services"]
    assert more.keys() == {"server"}
    assert more["server"]["build"]["target"] == "cuda"
    assert re.search(r"^FROM runtime AS cuda$", DOCKERFILE, re.MULTILINE)
