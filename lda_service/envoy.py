"""Envoy's configuration: one front for HTTP, gRPC and gRPC-Web before one server or several.

Everything that speaks HTTP is derived from the contract: routes from its `google.api.http` options, JSON from its
descriptors. `gateway` writes such a configuration for itself at each start, `tools/envoy.py` the ones in
`deploy/envoy/`. Knows Envoy's vocabulary; starts nothing.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2
from lda_client.gen.lda.v1 import completion_service_pb2, lda_service_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from google.protobuf.descriptor import FileDescriptor

Config = dict[str, Any]

CLUSTER = "lda"
LDA, COMPLETIONS = "lda.v1.LdaService", "lda.v1.CompletionService"
# What passes besides the services of the contract. lda.v1.AdminService does not: it speaks of one server.
STANDARD_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")
LOCAL_ORIGINS = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"
# More than the server takes, so that it is the server who says what is too much.
BODY_BYTES_MAX = 8 << 20
# What a caller who has stopped reading may hold here. A connection must carry many of those, or they stop the others.
STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES = 256 << 10, 256 << 20
CONCURRENT_MAX = 65536
# A file of the playground; Envoy holds all of them in memory.
PAGE_BYTES_MAX = 2 << 20

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page needs nothing from elsewhere, and nothing else may be done with it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

# Bad fields were 422 to callers of the earlier HTTP API; 3 is INVALID_ARGUMENT, and no status at all is broken JSON.
UNPROCESSABLE = """\
function envoy_on_response(handle)
  local headers = handle:headers()
  if headers:get(":status") == "400" and (headers:get("grpc-status") or "3") == "3" then
    headers:replace(":status", "422")
  end
end
"""


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS to the servers: files of this side, and what the other side's certificate must say.

    Without a certificate of its own, Envoy only checks the server's. `subject` is a DNS name or a URI among the
    alternative names.
    """

    ca: str
    subject: str
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Front:
    """What one Envoy is to do.

    Args:
        address: to listen on.
        port: to listen on; 0 picks a free one.
        server: host name or address of the servers; every address that a name has is one of them.
        server_port: their port.
        replicated: several servers may stand behind the name, so check their health, retry and eject.
        affinity_header: requests with the same value of this header go to the same server, if it is not overloaded.
        tls: to the servers; None speaks plain HTTP/2.
        access_log: one line per request on standard output.
        playground: folder with the files of the playground, to be served at `/`; None serves no page there.
    """

    address: str
    port: int
    server: str
    server_port: int
    replicated: bool = False
    affinity_header: str | None = None
    tls: UpstreamTls | None = None
    access_log: bool = False
    playground: Path | None = None


@dataclass(frozen=True, slots=True)
class HttpMethod:
    """A method of the contract as HTTP callers know it."""

    verb: str
    path: str
    service: str
    name: str
    streams: bool


def http_methods() -> list[HttpMethod]:
    """Every method that has an HTTP form, the earlier API's first."""
    methods = []
    for file in (completion_service_pb2.DESCRIPTOR, lda_service_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                rule = method.GetOptions().Extensions[annotations_pb2.http]
                verb = rule.WhichOneof("pattern")
                if verb is not None:
                    streams = method.server_streaming
                    path = getattr(rule, verb)
                    methods.append(HttpMethod(verb.upper(), path, service.full_name, method.name, streams))
    return methods


def descriptor_set() -> bytes:
    """The contract for Envoy's transcoder, with everything it imports and the details that errors carry."""
    files: dict[str, FileDescriptorProto] = {}

    def add(file: FileDescriptor) -> None:
        for imported in file.dependencies:
            if imported.name not in files:
                add(imported)
        files[file.name] = FileDescriptorProto()
        file.CopyToProto(files[file.name])

    for module in (lda_service_pb2, completion_service_pb2, error_details_pb2):
        add(module.DESCRIPTOR)
    return FileDescriptorSet(file=files.values()).SerializeToString(deterministic=True)


def tcp(address: str, port: int) -> Config:
    """An address of Envoy's."""
    return {"socket_address": {"address": address, "port_value": port}}


def bootstrap(front: Front, admin: Config, descriptors: str) -> Config:
    """The whole configuration of one Envoy.

    Args:
        front: what it is to do.
        admin: Envoy's own interface, as an Envoy address.
        descriptors: path of the file with `descriptor_set()`.
    """
    return {
        "admin": {"address": admin},
        "static_resources": {"listeners": [_listener(front, descriptors)], "clusters": [_cluster(front)]},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": _typed(
                        "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        max_active_downstream_connections=CONCURRENT_MAX,
                    ),
                }
            ]
        },
    }


def _typed(kind: str, **fields: Any) -> Config:
    return {"@type": f"type.googleapis.com/envoy.{kind}", **fields}


def _filter(name: str, kind: str, **fields: Any) -> Config:
    return {"name": f"envoy.filters.http.{name}", "typed_config": _typed(f"extensions.filters.http.{kind}", **fields)}


def _listener(front: Front, descriptors: str) -> Config:
    manager = _connection_manager(front, descriptors)
    return {
        "name": "front",
        "address": tcp(front.address, front.port),
        # Otherwise a second Envoy binds the same port and takes half of the calls.
        "enable_reuse_port": False,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _connection_manager(front: Front, descriptors: str) -> Config:
    return _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        codec_type="AUTO",
        stat_prefix="front",
        # A stream may be silent for as long as a prompt waits and is read.
        stream_idle_timeout="0s",
        # The status of a stream travels in trailers, over HTTP/1.1 too.
        http_protocol_options={"enable_trailers": True},
        http2_protocol_options={
            # A survey of many servers is one connection; by default it would carry 1,024 streams.
            "max_concurrent_streams": CONCURRENT_MAX,
            # Finds callers that vanished, which frees their rows.
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        use_remote_address=True,
        internal_address_config={},
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        normalize_path=True,
        **({"access_log": [_access_log(front)]} if front.access_log else {}),
        local_reply_config=_local_replies(),
        route_config={
            "name": "front",
            **({"max_direct_response_body_size_bytes": PAGE_BYTES_MAX} if front.playground else {}),
            "virtual_hosts": [_virtual_host(front, descriptors)],
        },
        http_filters=[
            _filter("cors", "cors.v3.Cors"),
            _filter("lua", "lua.v3.Lua"),
            _filter("grpc_web", "grpc_web.v3.GrpcWeb"),
            {"name": "envoy.filters.http.grpc_json_transcoder", "typed_config": _transcoder(descriptors)},
            _filter("router", "router.v3.Router", suppress_envoy_headers=True),
        ],
    )


def _access_log(front: Front) -> Config:
    prompt = f" prompt=%REQ({front.affinity_header})%" if front.affinity_header else ""
    line = (
        "%START_TIME% %REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %RESPONSE_CODE% grpc=%GRPC_STATUS% "
        "%RESPONSE_FLAGS% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% to=%UPSTREAM_HOST% %DURATION%ms "
        f"id=%REQ(X-REQUEST-ID)%{prompt}\n"
    )
    return {
        "name": "envoy.access_loggers.stdout",
        "typed_config": _typed(
            "extensions.access_loggers.stream.v3.StdoutAccessLog",
            log_format={"text_format_source": {"inline_string": line}},
        ),
    }


def _local_replies() -> Config:
    """What Envoy itself has to say about a JSON request looks like an error of the server: 3 or 14 and a sentence."""

    def mapper(code: int, comparison: str, status: int) -> Config:
        value = {"default_value": status, "runtime_key": f"lda.local_reply_{code}"}
        was_transcoded = {"header_filter": {"header": {"name": "x-envoy-original-path", "present_match": True}}}
        has_status = {"status_code_filter": {"comparison": {"op": comparison, "value": value}}}
        return {
            "filter": {"and_filter": {"filters": [was_transcoded, has_status]}},
            "body_format_override": {"json_format": {"code": code, "message": "%LOCAL_REPLY_BODY%"}},
        }

    return {"mappers": [mapper(14, "GE", 500), mapper(3, "GE", 400)]}


def _transcoder(descriptors: str, *, events: bool = False) -> Config:
    """JSON to messages and back; a stream becomes a line for each message, or with `events` a server-sent event."""
    options = {
        "preserve_proto_field_names": True,
        "always_print_primitive_fields": True,
        "stream_newline_delimited": True,
    }
    if events:
        options["stream_sse_style_delimited"] = True
    return _typed(
        "extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        proto_descriptor=descriptors,
        services=[LDA, COMPLETIONS],
        convert_grpc_status=True,
        ignore_unknown_query_parameters=True,
        print_options=options,
        request_validation_options={
            "reject_unknown_method": True,
            "reject_binding_body_field_collisions": True,
        },
        max_request_body_size=BODY_BYTES_MAX,
        max_response_body_size=BODY_BYTES_MAX,
    )


def _virtual_host(front: Front, descriptors: str) -> Config:
    headers = ["content-type", "accept", "authorization", "x-request-id", "x-grpc-web", "x-user-agent", "grpc-timeout"]
    if front.affinity_header:
        headers.append(front.affinity_header)
    return {
        "name": "front",
        "domains": ["*"],
        "request_body_buffer_limit": BODY_BYTES_MAX,
        **({"retry_policy": _retry_policy()} if front.replicated else {}),
        "typed_per_filter_config": {
            "envoy.filters.http.cors": _typed(
                "extensions.filters.http.cors.v3.CorsPolicy",
                allow_origin_string_match=[{"safe_regex": {"regex": LOCAL_ORIGINS}}],
                allow_methods="GET, POST, OPTIONS",
                allow_headers=",".join(headers),
                expose_headers="grpc-status,grpc-message,grpc-status-details-bin,x-generation-id,x-request-id",
                max_age="86400",
                forward_not_matching_preflights=False,
            )
        },
        "routes": [*_page_routes(front.playground), *_http_routes(descriptors), *_grpc_routes(front)],
    }


def _page_routes(folder: Path | None) -> list[Config]:
    """The files of the playground, `index.html` as `/`."""
    if folder is None:
        return []
    files = sorted(path for path in folder.rglob("*") if path.suffix in CONTENT_TYPES)
    return [_page_route(path, path.relative_to(folder).as_posix()) for path in files]


def _page_route(file: Path, name: str) -> Config:
    is_entry = name == "index.html"
    # The other names hold a hash of what is in them.
    cache = "no-cache" if is_entry else "public, max-age=31536000, immutable"
    headers = {
        "content-type": CONTENT_TYPES[file.suffix],
        "cache-control": cache,
        "content-security-policy": PAGE_POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    reads = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}}
    return {
        "match": {"path": "/" if is_entry else f"/{name}", "headers": [reads]},
        "direct_response": {"status": 200, "body": {"filename": str(file)}},
        "response_headers_to_add": _response_headers(headers),
        "typed_per_filter_config": _not_transcoded(),
    }


def _http_routes(descriptors: str) -> list[Config]:
    """What HTTP callers ask for. Once transcoded, a request is routed again, by the routes of gRPC."""
    methods, action = http_methods(), {"cluster": CLUSTER}
    asks_for_events = {"name": "accept", "string_match": {"contains": "text/event-stream"}}
    event_streams = {
        "match": {
            **_one_of(method.path for method in methods if method.streams),
            "headers": [asks_for_events, _verb("POST")],
        },
        "route": action,
        "typed_per_filter_config": {"envoy.filters.http.grpc_json_transcoder": _transcoder(descriptors, events=True)},
    }
    routes = [_docs(methods), event_streams]
    for verb in ("GET", "POST"):
        paths = _one_of(method.path for method in methods if method.verb == verb)
        routes += [{"match": {**paths, "headers": [_verb(verb)]}, "route": action}, _wrong_verb(verb, paths)]
    return routes


def _grpc_routes(front: Front) -> list[Config]:
    lua = {"source_code": {"inline_string": UNPROCESSABLE}}
    earlier_api = {
        "match": {"prefix": f"/{COMPLETIONS}/"},
        "route": _action(front),
        "typed_per_filter_config": {
            "envoy.filters.http.lua": _typed("extensions.filters.http.lua.v3.LuaPerRoute", **lua)
        },
    }
    others = [{"match": {"prefix": f"/{name}/"}, "route": _action(front)} for name in (LDA, *STANDARD_SERVICES)]
    return [earlier_api, *others]


def _docs(methods: list[HttpMethod]) -> Config:
    return {
        "match": {"path": "/docs"},
        "direct_response": {"status": 200, "body": {"inline_string": docs_page(methods)}},
        "response_headers_to_add": _response_headers({"content-type": "text/html; charset=utf-8"}),
        "typed_per_filter_config": _not_transcoded(),
    }


def docs_page(methods: list[HttpMethod]) -> str:
    """A page that lists the endpoints; scripts of the earlier server's callers look whether it is there."""
    rows = "\n".join(
        f"<tr><td><code>{each.verb} {html.escape(each.path)}</code></td>"
        f"<td>{html.escape(each.service)}/{each.name}{', a stream' if each.streams else ''}</td></tr>"
        for each in methods
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>lda-service</title>\n'
        "<h1>lda-service</h1>\n"
        "<p>JSON over HTTP, transcoded to the gRPC methods beside it. A stream is one JSON object per line, or "
        "server-sent events with <code>Accept: text/event-stream</code>. The same port takes gRPC and gRPC-Web.</p>\n"
        f"<table>\n{rows}\n</table>\n</html>\n"
    )


def _wrong_verb(verb: str, paths: Config) -> Config:
    return {
        "match": paths,
        "direct_response": {
            "status": 405,
            "body": {"inline_string": f'{{"code":12,"message":"Use {verb} here; /docs lists what there is."}}'},
        },
        "response_headers_to_add": _response_headers({"content-type": "application/json", "allow": verb}),
        "typed_per_filter_config": _not_transcoded(),
    }


def _not_transcoded() -> Config:
    return {"envoy.filters.http.grpc_json_transcoder": _typed("config.route.v3.FilterConfig", disabled=True)}


def _response_headers(values: dict[str, str]) -> list[Config]:
    return [
        {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for name, value in values.items()
    ]


def _one_of(paths: Iterable[str]) -> Config:
    return {"safe_regex": {"regex": "|".join(re.escape(path) for path in paths)}}


def _verb(verb: str) -> Config:
    return {"name": ":method", "string_match": {"exact": verb}}


def _action(front: Front) -> Config:
    """To the servers, for as long as it takes; a deadline of the caller's holds."""
    action: Config = {"cluster": CLUSTER, "timeout": "0s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}}
    if front.affinity_header:
        action["hash_policy"] = [{"header": {"header_name": front.affinity_header}}]
    return action


def _retry_policy() -> Config:
    """What was not begun is tried elsewhere: the server sends headers on admission only, and then nothing retries.

    CANCELLED is what gRPC says for a server that stops to calls that have just arrived.
    """
    return {
        "retry_on": "connect-failure,refused-stream,reset,unavailable,cancelled",
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": _typed("extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
            }
        ],
        "host_selection_retry_max_attempts": 20,
    }


def _cluster(front: Front) -> Config:
    endpoint = {"endpoint": {"address": tcp(front.server, front.server_port)}}
    cluster: Config = {
        "name": CLUSTER,
        "connect_timeout": "1s",
        "cluster_type": {
            "name": "envoy.cluster.dns",
            "typed_config": _typed("extensions.clusters.dns.v3.DnsCluster", dns_refresh_rate="5s"),
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config={"http2_protocol_options": _upstream_http2()},
            )
        },
        "circuit_breakers": {"thresholds": [_thresholds(front)]},
        "load_assignment": {"cluster_name": CLUSTER, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if front.replicated:
        cluster.update(_replication(front))
    if front.tls is not None:
        cluster["transport_socket"] = _upstream_tls(front.tls)
    return cluster


def _upstream_http2() -> Config:
    return {
        "initial_stream_window_size": STREAM_WINDOW_BYTES,
        "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
        # A server that hangs does not close its connections: this ends its streams, and retries those not begun.
        "connection_keepalive": {"interval": "10s", "timeout": "5s"},
    }


def _thresholds(front: Front) -> Config:
    """The server refuses what is too much, and says why: Envoy does not."""
    counts = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), CONCURRENT_MAX)
    if not front.replicated:
        return counts
    # By default three retries may run at once: fewer than a server that dies leaves behind.
    return {**counts, "retry_budget": {"budget_percent": {"value": 100}, "min_retry_concurrency": 256}}


def _replication(front: Front) -> Config:
    """How the servers behind one name are watched, and how one of them is chosen for each request."""
    common: Config = {
        "healthy_panic_threshold": {"value": 0},  # in a panic, Envoy sends to sick servers too
        "update_merge_window": "0s",  # else what was learnt of health and of new servers counts up to a second later
    }
    if front.affinity_header:
        # A server takes at most this share of the mean load; what is above goes elsewhere. So about 1/1.05 of the
        # servers are busy however few prompts there are, and a prompt is held by few of them (docs/replicas.md).
        common["consistent_hashing_lb_config"] = {"hash_balance_factor": 105}
    return {
        # The better of two at random, not the best of all: a server that refuses fast always looks like the best, and
        # a retry that looked for the best again would find the same one.
        "lb_policy": "RING_HASH" if front.affinity_header else "LEAST_REQUEST",
        "common_lb_config": common,
        "health_checks": [
            {
                # A server that is gone or does not serve says so at once; one that is slow to answer may just be busy.
                "timeout": "5s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": LDA},
            }
        ],
        "outlier_detection": {
            "consecutive_5xx": 5,
            "consecutive_gateway_failure": 5,
            "enforcing_consecutive_gateway_failure": 100,
            "enforcing_success_rate": 0,
            "interval": "1s",
            "base_ejection_time": "5s",
            "max_ejection_time": "60s",
            "max_ejection_percent": 50,
        },
    }


def _upstream_tls(tls: UpstreamTls) -> Config:
    kind = "URI" if "://" in tls.subject else "DNS"
    common: Config = {
        "alpn_protocols": ["h2"],
        "validation_context": {
            "trusted_ca": {"filename": tls.ca},
            "match_typed_subject_alt_names": [{"san_type": kind, "matcher": {"exact": tls.subject}}],
        },
    }
    if tls.certificate and tls.key:
        pair = {"certificate_chain": {"filename": tls.certificate}, "private_key": {"filename": tls.key}}
        common["tls_certificates"] = [pair]
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": _typed("extensions.transport_sockets.tls.v3.UpstreamTlsContext", common_tls_context=common),
    }
