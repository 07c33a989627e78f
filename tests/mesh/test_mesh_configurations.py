"""The files of `deploy/`: Envoy accepts its own, Kubernetes' schemas accept theirs, and none is stale."""

from __future__ import annotations

import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from mesh_harness import ROOT

from lda_service import gateway
from lda_service.config import ServerConfig
from lda_service.envoy import descriptor_set, docs_page, http_methods

ENVOY_FILES = sorted((ROOT / "deploy/envoy").glob("*.yaml"))
MANIFESTS = sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
# Of custom resources, whose schemas are their controllers'.
NOT_KNOWN = {"GRPCRoute", "ScaledObject", "Kustomization"}
KUBERNETES = ("1.30", "1.37")
DIRECT_RESPONSE_BYTES_MAX = 4096  # Envoy's limit


def documents():
    """(file name, manifest) of everything in deploy/kubernetes."""
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.stem}-{document['kind']}")


@pytest.mark.parametrize("path", ENVOY_FILES, ids=lambda path: path.name)
def test_envoy_accepts_its_configuration(path, tmp_path):
    """Each file passes `envoy --mode validate`, and without a warning."""
    (tmp_path / "lda.pb").write_bytes(descriptor_set())
    subprocess.run([ROOT / "deploy/certificates.sh", tmp_path / "tls"], check=True)
    for name, source in {"tls.crt": "client.crt", "tls.key": "client.key"}.items():
        (tmp_path / "tls" / source).rename(tmp_path / "tls" / name)
    (config := tmp_path / path.name).write_text(path.read_text().replace("/etc/lda/", f"{tmp_path}/"))
    command = [gateway.envoy_binary(), "--mode", "validate", "--log-level", "warn", "-c", config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_envoy_files_are_fresh():
    """What is committed is what the generator writes."""
    done = subprocess.run([sys.executable, ROOT / "tools/envoy.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_endpoint_is_on_the_page():
    """The page lists each HTTP form of the contract once, and fits into what Envoy takes."""
    page = docs_page(http_methods())
    assert len(http_methods()) == 10
    assert all(page.count(f"<code>{each.verb} {each.path}</code>") == 1 for each in http_methods())
    assert len(page.encode()) < DIRECT_RESPONSE_BYTES_MAX


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("manifest", list(documents()))
def test_manifests_fit_their_schemas(manifest, version):
    """Each manifest is valid, unknown keys included; custom resources are skipped by name."""
    if manifest["kind"] in NOT_KNOWN:
        pytest.skip(f"{manifest['kind']} is a custom resource: kubernetes-validate has no schema of it")
    kubernetes_validate.validate(manifest, version, strict=True)


def manifest(kind, name=None):
    """The one manifest of this kind."""
    (found,) = (
        each.values[0]
        for each in documents()
        if each.values[0]["kind"] == kind and name in (None, each.values[0]["metadata"]["name"])
    )
    return found


def test_a_pod_has_time_to_drain():
    """Kubernetes waits longer than the pause before SIGTERM and the grace of running streams take together."""
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace_s = float(manifest("ConfigMap")["data"]["DRAIN_GRACE"])
    assert grace_s >= ServerConfig().drain_grace_s
    assert pod["terminationGracePeriodSeconds"] > pause_s + grace_s + 5


def test_probes_ask_for_the_right_service():
    """Liveness asks for the process (""), startup and readiness for what it serves: a busy or loading pod lives."""
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    services = {
        name: container[f"{name}Probe"]["grpc"].get("service", "") for name in ("startup", "readiness", "liveness")
    }
    assert services == {"startup": "lda.v1.LdaService", "readiness": "lda.v1.LdaService", "liveness": ""}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {container[f"{name}Probe"]["grpc"]["port"] for name in services} == {ports["grpc"]}
    assert ports["grpc"] == int(manifest("ConfigMap")["data"]["PORT"])


def test_pods_may_write_only_where_they_must():
    """Pods run as a plain user on a read-only file system without privileges."""
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not pod["automountServiceAccountToken"]


def test_envoy_finds_the_pods():
    """The name and port in Envoy's files are those of the headless Service, which has an address for each pod."""
    service = manifest("Service", "lda-service-replicas")
    assert service["spec"]["clusterIP"] == "None"
    (port,) = service["spec"]["ports"]
    for path in ENVOY_FILES:
        text = path.read_text()
        assert re.search(rf"address: lda-service-replicas\n\s+port_value: {port['port']}\n", text), path.name
