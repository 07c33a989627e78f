"""Write the Envoy configurations of `deploy/envoy/`, or check that they are fresh.

    python tools/envoy.py                     write deploy/envoy/*.yaml
    python tools/envoy.py --check             exit 1 if what is committed differs
    python tools/envoy.py --descriptors FILE  write the descriptor set that they refer to
    python tools/envoy.py --into FOLDER HOST:PORT ...  write one with affinity before these servers, and what it reads

They come from the same generator as the configuration of `lda-service gateway`.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from lda_service.envoy import Front, UpstreamTls, bootstrap, descriptor_set, tcp

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "deploy/envoy"
FOLDER = "/etc/lda"
# A name with an address for each server: a headless Service of Kubernetes, or a service of Docker's.
SERVERS, PORT = "lda-service-replicas", 50051
TLS = UpstreamTls(
    ca=f"{FOLDER}/tls/ca.crt",
    subject="spiffe://cluster.local/ns/default/sa/lda-service",
    certificate=f"{FOLDER}/tls/tls.crt",
    key=f"{FOLDER}/tls/tls.key",
)

PURPOSES = {
    "envoy.yaml": "Several servers behind one name: balanced per request, watched, retried.",
    "envoy-mtls.yaml": "envoy.yaml with mutual TLS to the servers, whose certificates must carry the name below.",
    "envoy-affinity.yaml": "envoy.yaml, but requests with the same x-lda-prompt-hash go to the same server.",
}
HEADER = """\
# {purpose}
# Written by tools/envoy.py: change lda_service/envoy.py and run `make generate`. README.md says what is in it and why.
"""


def fronts() -> dict[str, Front]:
    """What each file configures."""

    def front(affinity_header: str | None = None, tls: UpstreamTls | None = None) -> Front:
        return Front(
            address="0.0.0.0",
            port=8000,
            server=SERVERS,
            server_port=PORT,
            replicated=True,
            access_log=True,
            affinity_header=affinity_header,
            tls=tls,
        )

    return {
        "envoy.yaml": front(),
        "envoy-mtls.yaml": front(tls=TLS),
        "envoy-affinity.yaml": front(affinity_header="x-lda-prompt-hash"),
    }


def files() -> dict[str, str]:
    """The text of each file."""
    admin, descriptors = tcp("127.0.0.1", 9901), f"{FOLDER}/lda.pb"
    return {
        name: HEADER.format(purpose=PURPOSES[name]) + _yaml(bootstrap(front, admin, descriptors))
        for name, front in fronts().items()
    }


def write_before(servers: list[str], folder: Path) -> None:
    """Write `envoy.yaml`, on loopback and with affinity, before servers without a common name, and `lda.pb`."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptors = (folder / "lda.pb").resolve()
    descriptors.write_bytes(descriptor_set())
    front = replace(fronts()["envoy-affinity.yaml"], address="127.0.0.1")
    config = bootstrap(front, tcp("127.0.0.1", 9901), str(descriptors))
    addresses = [server.rpartition(":") for server in servers]
    endpoints = [{"endpoint": {"address": tcp(host, int(port))}} for host, _, port in addresses]
    config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"] = [{"lb_endpoints": endpoints}]
    (folder / "envoy.yaml").write_text(_yaml(config))


class _Dumper(yaml.SafeDumper):
    """Repeats what occurs twice instead of referring to it; scripts and pages are blocks."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _string)


def _yaml(config: object) -> str:
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, width=120)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if a committed file is stale")
    parser.add_argument("--descriptors", type=Path, metavar="FILE", help="write the descriptor set there instead")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="write a configuration before SERVERS there")
    parser.add_argument("servers", nargs="*", metavar="HOST:PORT", help="of each server, with --into")
    options = parser.parse_args()
    if bool(options.into) != bool(options.servers):
        parser.error("--into and servers go together")
    if options.into:
        write_before(options.servers, options.into)
        return 0
    if options.descriptors:
        options.descriptors.write_bytes(descriptor_set())
        return 0
    texts = {TARGET / name: text for name, text in files().items()}
    if options.check:
        stale = [path.name for path, text in texts.items() if not path.exists() or path.read_text() != text]
        print(f"stale: {', '.join(stale)}; run `make generate` and commit" if stale else "deploy/envoy is fresh")
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
