"""deploy/k8s: every overlay is built, fits the schemas, and says what the server, its metrics and its rules say."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from server.cli import app
from server.metrics.series import SERIES, Kind, Page
from server.operations.endpoints import Endpoints
from server.settings import ServeSettings, flag_of, resolve_settings, variable_of
from tests.conformance.test_readme import flags_of

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "k8s"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
OVERLAYS = ("cpu", "gpu")
CRDS = {"PrometheusRule", "ServiceMonitor"}  # their schemas are the Prometheus operator's
VERSIONS = ("1.31", "1.34")  # the oldest that has what is used, and a new one
SETTINGS = ServeSettings.model_fields
GIB_IN_MIB = 1024
KUSTOMIZE = shutil.which("kubectl"), shutil.which("kustomize")

needs_kustomize = pytest.mark.skipif(not any(KUSTOMIZE), reason="neither kubectl nor kustomize is installed")
needs_schemas = pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate is not installed (extra: test)"
)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
pytestmark = needs_kustomize


@functools.cache
def build(folder: Path) -> tuple[dict[str, Any], ...]:
    kubectl, kustomize = KUSTOMIZE
    command = [kubectl, "kustomize"] if kubectl else [str(kustomize), "build"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def objects(overlay: str, kind: str) -> dict[str, dict[str, Any]]:
    """Those of a kind, by name."""
    built = build(FOLDER / "overlays" / overlay)
    return {one["metadata"]["name"]: one for one in built if one["kind"] == kind}


def pod_of(overlay: str) -> dict[str, Any]:
    (deployment,) = objects(overlay, "Deployment").values()
    return deployment["spec"]["template"]["spec"]


def container_of(overlay: str) -> dict[str, Any]:
    (container,) = pod_of(overlay)["containers"]
    return container


def flags(overlay: str) -> dict[str, str]:
    command, *arguments = container_of(overlay)["args"]
    assert command == "serve"
    return dict(argument.split("=", 1) for argument in arguments)


def variables(overlay: str) -> dict[str, str]:
    """What the ConfigMap and `env` say, the number of cores as the pod gets it."""
    container = container_of(overlay)
    (config,) = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    given = dict(objects(overlay, "ConfigMap")[config]["data"])
    for variable in container["env"]:
        field = variable.get("valueFrom", {}).get("resourceFieldRef", {}).get("resource")
        assert field in (None, "requests.cpu")
        given[variable["name"]] = container["resources"]["requests"]["cpu"] if field else variable["value"]
    return given


def settings(overlay: str, adapters: Path) -> ServeSettings:
    names = {flag_of(name): name for name in SETTINGS}
    given = {names[flag]: value for flag, value in flags(overlay).items()}
    return resolve_settings({**given, "adapters": str(adapters)}, variables(overlay))


@needs_schemas
@pytest.mark.parametrize("version", VERSIONS)
@every_overlay
def test_every_object_fits_its_schema(overlay: str, version: str) -> None:
    validate = importlib.import_module("kubernetes_validate").validate
    checked = {one["kind"] for one in build(FOLDER / "overlays" / overlay) if one["kind"] not in CRDS}
    for one in build(FOLDER / "overlays" / overlay):
        if one["kind"] in checked:
            validate(one, version, strict=True)
    assert checked >= {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"}


@every_overlay
def test_the_server_takes_every_flag_and_variable(overlay: str, tmp_path: Path) -> None:
    assert flags(overlay).keys() <= {flag_of(name) for name in SETTINGS}
    named = {name for name in variables(overlay) if name.startswith("MULTILORA_")}
    assert named <= {variable_of(name) for name in SETTINGS}
    assert not {flag_of(name) for name in SETTINGS if variable_of(name) in named} & flags(overlay).keys(), "said twice"
    given = settings(overlay, tmp_path)
    assert given.tls_cert is not None and given.tls_key is not None and given.auth != "none"
    assert (given.device == "cuda") == (overlay == "gpu")


@every_overlay
def test_no_service_can_set_a_variable_of_the_server(overlay: str) -> None:
    """A Service of this name puts MULTILORA_PORT into the pods of its namespace, unless they refuse."""
    assert variable_of("port") == "MULTILORA_PORT" and "multilora" in objects(overlay, "Service")
    assert pod_of(overlay)["enableServiceLinks"] is False


@every_overlay
def test_probes_ask_what_answers(overlay: str, tmp_path: Path) -> None:
    container, given = container_of(overlay), settings(overlay, tmp_path)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": given.port, "metrics": given.metrics_port}
    assert given.host == given.metrics_host == "0.0.0.0"
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {probe["path"] for probe in probes.values()} <= object.__new__(Endpoints).routes.keys()
    assert {probe["port"] for probe in probes.values()} == {"metrics"}


@every_overlay
def test_the_pod_lives_as_long_as_its_drain(overlay: str, tmp_path: Path) -> None:
    given = settings(overlay, tmp_path)
    takes = given.drain_delay + given.grace
    assert takes + 5 <= pod_of(overlay)["terminationGracePeriodSeconds"] <= takes + 15
    readiness = container_of(overlay)["readinessProbe"]
    assert given.drain_delay >= readiness["periodSeconds"] * readiness["failureThreshold"]


@every_overlay
def test_the_pod_may_do_little(overlay: str) -> None:
    pod, container = pod_of(overlay), container_of(overlay)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    namespace = objects(overlay, "Namespace")["multilora"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@every_overlay
def test_what_the_server_reads_and_writes_is_mounted(overlay: str, tmp_path: Path) -> None:
    given = settings(overlay, tmp_path)
    volumes = {volume["name"]: volume for volume in pod_of(overlay)["volumes"]}
    mounts = {Path(mount["mountPath"]): mount for mount in container_of(overlay)["volumeMounts"]}
    assert all("subPath" not in mount for mount in mounts.values()), "files of a subPath are never renewed"

    def volume_of(path: Path) -> dict[str, Any]:
        mount = mounts[max((place for place in mounts if path.is_relative_to(place)), key=lambda p: len(p.parts))]
        assert mount.get("readOnly", False) == ("emptyDir" not in volumes[mount["name"]])
        return volumes[mount["name"]]

    assert given.tls_cert is not None and given.tls_key is not None and given.state is not None
    assert volume_of(given.tls_cert) is volume_of(given.tls_key)
    assert volume_of(given.tls_cert)["secret"]["secretName"] == "multilora-tls"
    assert volume_of(Path(given.auth))["secret"]["secretName"] == "multilora-auth"
    assert "emptyDir" in volume_of(given.state) and given.state not in mounts, "the server makes it, of mode 700"
    assert "emptyDir" in volume_of(Path("/tmp"))
    for path in (given.base, variables(overlay)["MULTILORA_ADAPTERS"]):
        assert volume_of(Path(path))["persistentVolumeClaim"]["claimName"] == "multilora-models"


@every_overlay
def test_memory_and_disk_are_enough_for_what_the_settings_may_take(overlay: str, tmp_path: Path) -> None:
    given, container = settings(overlay, tmp_path), container_of(overlay)
    limits = {name: mib(value) for name, value in container["resources"]["limits"].items() if value.endswith("Gi")}
    on_host = given.host_mib if overlay == "gpu" else given.arena_mib + given.kv_mib
    assert on_host + 4 * GIB_IN_MIB <= limits["memory"]
    sizes = {v["name"]: mib(v["emptyDir"]["sizeLimit"]) for v in pod_of(overlay)["volumes"] if "emptyDir" in v}
    assert given.cache_mib + 4 * given.max_upload_mib <= sizes["state"]
    assert sum(sizes.values()) <= limits["ephemeral-storage"]
    requests = container["resources"]["requests"]
    assert requests["memory"] == container["resources"]["limits"]["memory"]
    assert (requests.get("nvidia.com/gpu") == "1") == (overlay == "gpu")


def mib(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * GIB_IN_MIB


@every_overlay
def test_everything_selects_the_pods(overlay: str, tmp_path: Path) -> None:
    (deployment,) = objects(overlay, "Deployment").values()
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    services = objects(overlay, "Service")
    assert services["multilora-replicas"]["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in services["multilora"]["spec"]
    selectors = [service["spec"]["selector"] for service in services.values()]
    for kind, path in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        selectors += [one["spec"][path]["matchLabels"] for one in objects(overlay, kind).values()]
    selectors.append(deployment["spec"]["selector"]["matchLabels"])
    assert len(selectors) == 5
    assert all(selector.items() <= labels.items() for selector in selectors)
    given = settings(overlay, tmp_path)
    ports = {port["name"]: port["port"] for port in services["multilora-replicas"]["spec"]["ports"]}
    assert ports == {"grpc": given.port, "metrics": given.metrics_port}


@every_overlay
def test_prometheus_scrapes_each_replica_once(overlay: str) -> None:
    (monitor,) = objects(overlay, "ServiceMonitor").values()
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    found = [one for one in objects(overlay, "Service").values() if wanted <= one["metadata"]["labels"].items()]
    assert [one["metadata"]["name"] for one in found] == ["multilora-replicas"]
    assert [(endpoint["port"], endpoint["path"]) for endpoint in monitor["spec"]["endpoints"]] == [
        ("metrics", "/metrics")
    ]
    assert monitor["spec"]["jobLabel"] in found[0]["metadata"]["labels"]


@every_overlay
def test_the_rules_are_those_of_the_rules_file(overlay: str) -> None:
    (rule,) = objects(overlay, "PrometheusRule").values()
    assert rule["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "multilora.rules.yaml").read_text()), (
        "deploy/k8s/components/monitoring/prometheusrule.yaml is stale; its head has the command that makes it anew"
    )


@every_overlay
def test_the_autoscaler_asks_for_gauges_that_are_served(overlay: str) -> None:
    (scaler,) = objects(overlay, "HorizontalPodAutoscaler").values()
    names = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert "multilora_queued_sequences" in names
    for name in names:
        assert SERIES[name].kind is Kind.GAUGE and SERIES[name].page is not Page.ROUTER
        assert not SERIES[name].labels, "an average of samples with labels is none of pods"
    values = (FOLDER / "components" / "autoscaling" / "prometheus-adapter.values.yaml").read_text()
    (rule,) = yaml.safe_load(values)["rules"]["custom"]
    assert set(re.findall(r"multilora_\w+", rule["seriesQuery"])) == names
    (deployment,) = objects(overlay, "Deployment").values()
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "applying the manifests again would undo the autoscaler"


@every_overlay
def test_images_are_placeholders_that_an_overlay_replaces(overlay: str) -> None:
    assert re.fullmatch(r"registry\.example/multilora:[\d.]+-c(pu|uda)", container_of(overlay)["image"])
    version = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["version"]
    assert f":{version}-" in container_of(overlay)["image"]


def commands() -> Iterator[str]:
    section = README[README.index("\n## Kubernetes\n") :]
    for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()


def test_the_commands_of_the_readme_exist() -> None:
    known = set(flags_of(get_command(app)))
    for line in commands():
        for part in re.findall(r"(?:^|\| |&& )multilora (.*?)(?: \||$)", line):
            assert set(re.findall(r"(?<=\s)--[a-z][a-z-]+", f" {part}")) <= known, line
    folders = {path for line in commands() for path in re.findall(r"-k (deploy/\S+)", line)}
    assert folders >= {f"deploy/k8s/overlays/{overlay}" for overlay in OVERLAYS}


def test_dashboards_become_config_maps() -> None:
    dashboards = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    if not dashboards:
        pytest.skip("deploy/grafana/dashboards has no dashboards")
    (config,) = build(DEPLOY / "grafana")
    assert config["kind"] == "ConfigMap" and config["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert config["data"] == {path.name: path.read_text() for path in dashboards}
