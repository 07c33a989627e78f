"""`lda-service gateway` over the fake engine, as callers of HTTP, gRPC and gRPC-Web see it: curl is one of them."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import pytest_asyncio
from click.testing import CliRunner
from grpc_health.v1 import health_pb2
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from mesh_engine import GATE
from mesh_harness import NO_RETRIES, WAIT_S, Replica
from server_harness import Client, outcome

from lda_service import cli, gateway
from lda_service.errors import ConfigError

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine"),
]

PROMPT = {"prompt": "hi", "apply_chat_template": False}
EARLIER_API = ("/generate_lda", "/generate_lda_batch", "/generate")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server():
    started = await Replica({"http": 0, "max_buffered_tokens": 50}).start()
    yield started
    await started.kill()


@pytest_asyncio.fixture(loop_scope="module")
async def client(server):
    """Over gRPC, through the port of HTTP."""
    connected = Client(server.http_port, NO_RETRIES)
    yield connected
    await connected.channel.close()


async def curl(server, path, body=None, *options):
    """What curl prints: with `-i` headers, body and trailers."""
    process = await start_curl(server, path, body, *options)
    out, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0
    return out.decode()


async def start_curl(server, path, body=None, *options):
    data = () if body is None else ("-d", body if isinstance(body, str) else json.dumps(body))
    url = f"http://127.0.0.1:{server.http_port}{path}"
    return await asyncio.create_subprocess_exec("curl", "-sN", *options, *data, url, stdout=subprocess.PIPE)


async def ask(server, path, body=None, *options):
    """(status, JSON body)."""
    text, _, status = (await curl(server, path, body, "-w", "\n%{http_code}", *options)).rpartition("\n")
    return int(status), json.loads(text)


async def test_generate_lda(server):
    """POST /generate_lda answers with every field of the earlier server, and takes its defaults."""
    status, answer = await ask(server, "/generate_lda", PROMPT)
    letters = "".join(chr(ord("a") + n % 26) for n in range(80))
    assert status == 200
    assert answer == {
        "prompt": "hi",
        "formatted_prompt": "hi",
        "completion": letters,
        "text": f"hi{letters}",
        "alpha": 1,
        "model_after": "fake",
        "model_before": "fake",
        "tokens_generated": 80,
        "stopped_early": False,
    }


async def test_generate_lda_takes_what_the_earlier_server_took(server):
    """All fields of a request, null for one that is not meant, fields nobody knows, alpha 0: accepted as before."""
    body = {
        "prompt": "hi",
        "max_new_tokens": 2,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 1,
        "alpha": 0,
        "apply_chat_template": True,
        "system_prompt": None,
        "someone": "else",
    }
    status, answer = await ask(server, "/generate_lda?x=1", body, "-H", "content-type: application/json")
    assert (status, answer["completion"], answer["alpha"]) == (200, "ab", 0)
    assert answer["formatted_prompt"] == "<user>hi"


async def test_generate_lda_batch(server):
    """POST /generate_lda_batch answers for each prompt, with every field."""
    status, answer = await ask(server, "/generate_lda_batch", {"prompts": ["x", "y"], "max_new_tokens": 2, "alpha": 2})
    one = {"formatted_prompt": "<user>x", "completion": "ab", "tokens_generated": 2, "stopped_early": False}
    assert status == 200
    assert answer == {
        "results": [
            {**one, "prompt": "x", "text": "xab"},
            {**one, "prompt": "y", "text": "yab", "formatted_prompt": "<user>y"},
        ],
        "alpha": 2,
        "model_after": "fake",
        "model_before": "fake",
        "batch_size": 2,
    }


async def test_a_large_batch_passes(server, tmp_path):
    """Bodies above Envoy's usual buffer of 1 MiB pass in both directions."""
    prompts = [f"{n:02}" + "p" * 40_000 for n in range(32)]
    (body := tmp_path / "body.json").write_text(json.dumps({"prompts": prompts, "max_new_tokens": 1}))
    status, answer = await ask(server, "/generate_lda_batch", f"@{body}")
    assert (status, [each["prompt"] for each in answer["results"]]) == (200, prompts)


async def test_generate(server):
    """POST /generate answers with both models side by side; greedy decoding is a word of its own here."""
    status, answer = await ask(server, "/generate", {**PROMPT, "max_new_tokens": 2, "do_sample": False})
    said = {"model_id": "fake", "completion": "ab", "text": "hiab"}
    assert (status, answer) == (200, {"prompt": "hi", "model_1": said, "model_2": said})


async def test_tokenizer_compatibility(server):
    """GET /tokenizer_compatibility says null when there is nothing to warn of."""
    assert await ask(server, "/tokenizer_compatibility") == (
        200,
        {"compatible": True, "vocab_size_1": 256, "vocab_size_2": 256, "vocabs_match": True, "warning": None},
    )


async def test_docs(server):
    """GET /docs is there, which scripts of the earlier server wait for, and lists every endpoint."""
    page = await curl(server, "/docs", None, "-i")
    assert page.startswith("HTTP/1.1 200")
    assert "content-type: text/html" in page
    assert all(path in page for path in (*EARLIER_API, "/tokenizer_compatibility", "/v1:generateLda"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("max_new_tokens", 0),
        ("max_new_tokens", 513),
        ("temperature", 0),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("alpha", 101),
        ("alpha", -101),
    ],
)
async def test_values_out_of_range_are_422(server, field, value):
    """The earlier ranges hold (alpha's is wider now); the answer is 422, as it was, and names the field."""
    status, answer = await ask(server, "/generate_lda", {**PROMPT, field: value})
    details = {each["@type"].rpartition(".")[2]: each for each in answer["details"]}
    assert (status, answer["code"]) == (422, 3)
    assert details["ErrorInfo"]["reason"] == "VALIDATION_FAILED"
    assert [each["field"] for each in details["BadRequest"]["field_violations"]] == [field]


@pytest.mark.parametrize("path", EARLIER_API)
@pytest.mark.parametrize("body", ["{", '{"prompt": 3, "prompts": 3}', "[]"])
async def test_broken_json_is_422(server, path, body):
    """What is no JSON, or has the wrong types, is answered in JSON like any other mistake."""
    status, answer = await ask(server, path, body)
    assert (status, answer["code"]) == (422, 3)
    assert answer["message"]


async def test_errors_of_the_stream_methods_keep_their_http_status(server):
    """Before the first message an error has its own HTTP status and `google.rpc` details: 400, 429."""
    status, answer = await ask(server, "/v1:generateLda", {"prompt": {"text": "hi"}, "sampling": {"top_p": 2}})
    assert (status, answer["code"]) == (400, 3)
    assert [each["field"] for each in answer["details"][1]["field_violations"]] == ["sampling.top_p"]
    status, answer = await ask(server, "/v1:generateLda", {"prompt": {"text": "full"}})
    assert (status, answer["code"], answer["details"][0]["reason"]) == (429, 8, "QUEUE_FULL")
    assert answer["details"][1]["retry_delay"] == "2s"


async def test_paths_and_verbs_that_are_not_there(server):
    """An unknown path is 404, as is what an operator may do; another verb is 405."""
    for path in ("/", "/v1:nothing", "/generate_ldap", "/v1/", "/lda.v1.AdminService/ListGenerations"):
        assert (await curl(server, path, "{}", "-o", "/dev/null", "-w", "%{http_code}")) == "404", path
    for path, options in (("/generate_lda", ()), ("/v1/modelPair", ("-X", "POST")), ("/v1:score", ("-X", "PUT"))):
        assert (await curl(server, path, None, *options, "-o", "/dev/null", "-w", "%{http_code}")) == "405", path


async def test_a_stream_is_a_line_for_each_message(server):
    """POST /v1:generateLda: a JSON object per line, `finished` for every sequence, and OK in the trailers."""
    body = {"prompt": {"text": "hi"}, "num_sequences": 2, "stopping": {"max_new_tokens": 3}}
    text = await curl(server, "/v1:generateLda", body, "-i")
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [next(iter(each)) for each in events] == ["started"] + ["delta"] * 6 + ["finished"] * 2
    assert events[0]["started"]["sequence_count"] == 2
    assert events[-1]["finished"]["reason"] == "FINISH_REASON_MAX_TOKENS"
    assert f"x-generation-id: {events[0]['started']['generation_id']}" in text
    assert trailers(text)["grpc-status"] == "0"


async def test_a_stream_of_server_sent_events(server):
    """`Accept: text/event-stream` gets the same messages as events."""
    body = {"prompt": {"text": "hi"}, "stopping": {"max_new_tokens": 2}}
    text = await curl(server, "/v1:generateLda", body, "-i", "-H", "Accept: text/event-stream")
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "content-type: text/event-stream" in text
    assert [next(iter(each)) for each in events] == ["started", "delta", "delta", "finished"]
    assert "}\r\n\r\ndata:" in text.replace("\n", "\r\n").replace("\r\r\n", "\r\n")
    assert trailers(text)["grpc-status"] == "0"


async def test_messages_arrive_as_they_are_made(server):
    """A stream that waits has already shown what it had."""
    process = await start_curl(server, "/v1:generateLda", {"prompt": {"text": "hold"}})
    line = await asyncio.wait_for(process.stdout.readline(), WAIT_S)
    assert "started" in json.loads(line)
    process.kill()
    await process.wait()


@pytest.mark.parametrize("options", [(), ("-H", "Accept: text/event-stream")])
async def test_an_error_in_mid_stream_is_seen(server, options):
    """HTTP has said 200 by then: the status is in the trailers, and the `finished` that is missing tells it too."""
    text = await curl(server, "/v1:generateLda", {"prompt": {"text": "oom"}}, "-i", *options)
    assert text.startswith("HTTP/1.1 200")
    assert '"started"' in text
    assert "finished" not in text
    assert trailers(text)["grpc-status"] == "8"
    assert trailers(text)["grpc-message"].startswith("Device memory ran out")


async def test_a_caller_that_leaves_frees_its_rows(server, client):
    """When curl is killed the engine is told at once."""
    process = await start_curl(server, "/v1:generateLda", {"prompt": {"text": "hold"}})
    started = json.loads(await asyncio.wait_for(process.stdout.readline(), WAIT_S))["started"]
    process.kill()
    await process.wait()
    await client.engine_cancelled(started["generation_id"])


async def test_a_reader_that_stops_is_ended_alone(server, client):
    """A caller who stops reading holds a bounded amount here, then its stream ends; the others go on."""
    with closing(socket.create_connection(("127.0.0.1", server.http_port))) as stalled:
        body = json.dumps({"prompt": {"text": "wide"}, "stopping": {"max_new_tokens": 4096}}).encode()
        head = f"POST /v1:generateLda HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        stalled.sendall(head.encode() + body)
        text = b""
        while b'"generation_id":"' not in text:
            text += await asyncio.get_running_loop().run_in_executor(None, stalled.recv, 512)
        generation_id = text.partition(b'"generation_id":"')[2].partition(b'"')[0].decode()
        assert await outcome(client.generate(tokens=26)) == "OK"
        await client.engine_cancelled(generation_id)


async def test_grpc_on_the_same_port(server, client):
    """gRPC, health and reflection pass through the port of HTTP; what an operator may do does not."""
    assert await outcome(client.generate(tokens=3)) == "OK"
    assert await client.health_of() == "SERVING"
    watch = client.watch()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_grpc_web_and_cors(server):
    """A page from this machine may call by gRPC-Web; one from elsewhere gets no permission."""
    path = "/lda.v1.LdaService/GenerateLDA"
    preflight = ("-i", "-X", "OPTIONS", "-H", "Access-Control-Request-Method: POST", "-H")
    near = await curl(server, path, None, *preflight, "Origin: http://localhost:5173")
    far = await curl(server, path, None, *preflight, "Origin: http://elsewhere.example")
    assert "access-control-allow-origin: http://localhost:5173" in near
    assert "access-control-allow-origin" not in far
    message = pb.GenerateLDARequest(prompt=pb.Prompt(text="hi"), stopping=pb.Stopping(max_new_tokens=1))
    packed = message.SerializeToString()
    frames = await asyncio.to_thread(_post_grpc_web, server, path, b"\0" + len(packed).to_bytes(4, "big") + packed)
    events = [pb.GenerateLDAResponse.FromString(data).WhichOneof("event") for flag, data in frames if not flag]
    assert events == ["started", "delta", "finished"]
    assert (frames[-1][0], b"grpc-status:0" in frames[-1][1]) == (128, True)


def _post_grpc_web(server, path, body):
    """The frames of the answer: (flag, data), the one with the trailers flagged 128."""
    headers = {"content-type": "application/grpc-web+proto", "origin": "http://localhost:5173"}
    with urlopen(Request(f"http://127.0.0.1:{server.http_port}{path}", body, headers), timeout=WAIT_S) as response:
        answer = response.read()
    frames = []
    while answer:
        size = int.from_bytes(answer[1:5], "big")
        frames.append((answer[0], answer[5 : 5 + size]))
        answer = answer[5 + size :]
    return frames


async def test_503_while_the_models_are_loaded(tmp_path):
    """HTTP answers from the start: 503 with the reason LOADING until the pair is there, then the answer."""
    os.mkfifo(gate := tmp_path / "gate")
    server = await Replica({"http": 0}, {GATE: str(gate)}).start(ready=False)
    try:
        status, answer = await ask(server, "/tokenizer_compatibility")
        assert (status, answer["details"][0]["reason"]) == (503, "LOADING")
        gate.write_bytes(b"")
        await server.ready()
        assert (await ask(server, "/tokenizer_compatibility"))[0] == 200
    finally:
        await server.kill()


async def test_a_signal_drains_http_too():
    """SIGTERM lets a stream over HTTP run to its end; then server and Envoy end, with code 0."""
    server = await Replica({"http": 0}).start()
    envoy = os.pidfd_open(child_of(server.process.pid, "envoy"))
    body = {"prompt": {"text": "hi"}, "stopping": {"max_new_tokens": 300}}
    process = await start_curl(server, "/v1:generateLda", body, "-i")
    while b'"delta"' not in await process.stdout.readline():
        pass
    server.process.terminate()
    rest = (await process.stdout.read()).decode()
    assert '"finished"' in rest
    assert trailers(rest)["grpc-status"] == "0"
    assert await server.ended() == 0
    assert await gone(envoy)


async def test_the_end_of_envoy_ends_the_gateway():
    """A gateway without Envoy is none: it drains, says so, and ends with an error."""
    server = await Replica({"http": 0}).start()
    os.kill(child_of(server.process.pid, "envoy"), 9)
    assert await server.ended() == 1


async def test_envoy_ends_with_the_gateway():
    """Kill -9 of the gateway leaves no Envoy behind that holds the port."""
    server = await Replica({"http": 0}).start()
    envoy = os.pidfd_open(child_of(server.process.pid, "envoy"))
    await server.kill()
    assert await gone(envoy)


def child_of(pid, name):
    """The process id of a child with this name."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (child,) = (each for each in children if Path(f"/proc/{each}/comm").read_text().strip() == name)
    return int(child)


async def gone(pidfd):
    """Wait until a process has ended."""
    ended, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], WAIT_S)
    os.close(pidfd)
    return bool(ended)


def trailers(text):
    """What follows the body of an answer that `curl -i` printed."""
    lines = text.replace("\r", "").rstrip().splitlines()
    return dict(line.split(": ", 1) for line in lines[-8:] if line and line[0].islower() and ": " in line)


async def test_a_taken_port_is_named():
    """The command says which port is taken and how to choose another one, before any model is touched."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = await asyncio.to_thread(CliRunner().invoke, cli.main, ["gateway", "--port", "0", "--http-port", port])
    assert result.exit_code == 1
    assert f"Another process listens on 127.0.0.1:{port}" in result.stderr
    assert "--http-port" in result.stderr


async def test_tls_of_the_server_is_not_the_gateways():
    """The gateway says that it speaks plain text to its server, before any model is touched."""
    files = {"TLS_CERT": __file__, "TLS_KEY": __file__}
    result = await asyncio.to_thread(CliRunner().invoke, cli.main, ["gateway", "--port", "0"], env=files)
    assert result.exit_code == 1
    assert "leave out TLS_CERT" in result.stderr


async def test_a_missing_envoy_is_named(monkeypatch):
    """Without the package, the error says what to install."""
    monkeypatch.setitem(sys.modules, "envoy", None)
    with pytest.raises(ConfigError, match=r"lda-service\[gateway\]"):
        gateway.envoy_binary()


async def test_gateway_takes_the_flags_of_serve():
    """Every flag of `serve` is one of `gateway`."""
    assert set(cli.gateway.params) - set(cli.serve.params) == set(cli.gateway.params[:2])
    assert {option.name for option in cli.gateway.params[:2]} == {"http_host", "http_port"}
