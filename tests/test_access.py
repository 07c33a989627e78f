"""Who is let in, who is not, and that those outside learn nothing: tokens, certificates, their rotation."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256

import grpc
import jwt
import pytest
import pytest_asyncio
from certificates import Authority, private_pem, put
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from lda_client import AccessDenied, AsyncLdaClient
from lda_client._cli import lda
from lda_client.gen.lda.v1 import admin_service_pb2 as admin_pb
from lda_client.gen.lda.v1 import admin_service_pb2_grpc, completion_service_pb2
from lda_client.gen.lda.v1 import lda_service_pb2 as pb
from server_harness import Client, failure, make_server, messages, outcome, serving
from tiny_models import save_model

from lda_service import cli
from lda_service.config import AccessConfig, AdmissionConfig, PairConfig
from lda_service.engine.pair import load_pair
from lda_service.errors import ConfigError, PortInUse, StartupError
from lda_service.rpc import tokens as token_file
from lda_service.rpc.access import OPEN_METHODS, SCOPE_OF, tell_exposure
from lda_service.rpc.reload import Source

module_loop = pytest.mark.asyncio(loop_scope="module")

FILES = (pb.DESCRIPTOR, completion_service_pb2.DESCRIPTOR, admin_pb.DESCRIPTOR)
CONTRACT = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
]
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
UNKNOWN = ["/lda.v1.LdaService/Nothing", "/no.such.Service/Method", "/grpc.health.v1.Health/List", "nothing"]
METHODS = [*CONTRACT, REFLECTION, *UNKNOWN]
VALID = pb.GenerateLDARequest(prompt=pb.Prompt(text="hi"), stopping=pb.Stopping(max_new_tokens=2)).SerializeToString()
INVALID = pb.GenerateLDARequest(alpha=1000).SerializeToString()
MESSAGES = {"valid": VALID, "invalid": INVALID, "garbage": b"\xff\xff", "empty": b""}
MODEL = "fake"  # what the fake engine calls its model

TOKENS = {"alice": "t-alice", "bob": "t-bob", "scorer": "t-scorer", "root": "t-root", "old": "t-old"}
SCOPES = {"alice": "generate", "bob": "generate", "scorer": "score", "root": "admin", "old": "generate,score,admin"}


def line(name, token, scopes, expires=""):
    """A line of the file of tokens."""
    return f"{name} {sha256(token.encode()).hexdigest()} {scopes} {expires}\n"


def token_lines():
    """The file that most tests use: `old` has expired, the others have not."""
    expires = {"old": "2020-01-01", "alice": "2999-12-31T23:59:59+01:00"}
    lines = [line(name, token, SCOPES[name], expires.get(name, "")) for name, token in TOKENS.items()]
    return "# name sha256 scopes expires\n\n" + "".join(lines)


def bearer(token):
    """The metadata of a token."""
    return (("authorization", f"Bearer {token}"),)


def raw(client, method, message=VALID, metadata=None):
    """A call of any method, known or not, with any bytes."""
    return client.channel.unary_stream(method)(message, metadata=metadata, timeout=30)


async def refusal(call):
    """What a refused call learned, without the id of the request."""
    refused = await failure(call)
    assert refused.trailing.pop("x-request-id")
    assert MODEL not in repr(refused)
    assert refused.initial == {}
    return refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where files lie that no test changes."""
    return tmp_path_factory.mktemp("access")


@pytest.fixture(scope="module")
def tokens_file(folder):
    """A file of tokens."""
    path = folder / "tokens"
    path.write_text(token_lines())
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tokens_file):
    """A client without a token, of a server that wants one."""
    async with serving(access=AccessConfig(tokens_file=tokens_file)) as (_, client):
        yield client


WITHOUT_RIGHT = {
    "none": (),
    "empty": (("authorization", ""),),
    "no token": (("authorization", "Bearer "),),
    "another scheme": (("authorization", f"Basic {TOKENS['root']}"),),
    "bare": (("authorization", TOKENS["root"]),),
    "unknown": bearer("t-nobody"),
    "a prefix": bearer(TOKENS["root"][:-1]),
    "two tokens": bearer(TOKENS["root"]) + bearer(TOKENS["alice"]),
    "the hash": bearer(sha256(TOKENS["root"].encode()).hexdigest()),
    "another key": (("x-authorization", f"Bearer {TOKENS['root']}"),),
    "like a web token": bearer("e30.e30.e30"),
}


@pytest.mark.parametrize("metadata", WITHOUT_RIGHT.values(), ids=WITHOUT_RIGHT)
@module_loop
async def test_without_a_token_every_method_answers_alike(client, metadata):
    """No method, known or not, and no message, valid or not, changes one bit of the answer."""
    calls = [raw(client, method, message, metadata) for method in METHODS for message in MESSAGES.values()]
    first, *others = [await refusal(call) for call in calls]
    assert (first.code, first.reason, first.metadata) == ("UNAUTHENTICATED", "UNAUTHENTICATED", {})
    assert all(other == first for other in others)


@module_loop
async def test_an_expired_token_is_told_so_and_nothing_else(client):
    """Whoever holds a token that was good once learns that it expired, from every method alike."""
    first, *others = [await refusal(raw(client, method, metadata=bearer(TOKENS["old"]))) for method in METHODS]
    assert (first.code, first.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
    assert "expired" in first.message
    assert all(other == first for other in others)


def test_every_method_of_the_contract_has_a_scope():
    """A method that is added without one needs `admin`; this test asks for a decision."""
    assert {each for each in CONTRACT if "AdminService" not in each} == set(SCOPE_OF)


@pytest.mark.parametrize("name", ["alice", "scorer", "root"])
@module_loop
async def test_a_token_opens_its_scope_only(client, name):
    """The other methods are refused alike, whatever was sent, with the scope that is missing."""
    for method in METHODS:
        scope = SCOPE_OF.get(method, "admin")
        if scope in (None, SCOPES[name]):
            assert await outcome(raw(client, method, b"", bearer(TOKENS[name]))) not in (
                "PERMISSION_DENIED",
                "UNAUTHENTICATED",
            )
            continue
        first, *others = [
            await refusal(raw(client, method, message, bearer(TOKENS[name]))) for message in MESSAGES.values()
        ]
        assert (first.code, first.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
        assert first.metadata == {"scope": scope}
        assert all(other == first for other in others)


@module_loop
async def test_scopes_do_what_they_say(client):
    """Generate, score, list what runs and describe the services, each with its token."""
    alice, scorer, root = (bearer(TOKENS[name]) for name in ("alice", "scorer", "root"))
    assert await outcome(client.generate(metadata=alice)) == "OK"
    score = pb.ScoreRequest(prompt=pb.Prompt(text="p"), continuation=pb.Prompt(text="c"))
    assert await outcome(client.lda.Score(score, metadata=scorer, timeout=30)) == "OK"
    for metadata in (alice, scorer, root):
        pair = await client.lda.GetModelPair(pb.GetModelPairRequest(), metadata=metadata, timeout=30)
        assert pair.after.model_id == MODEL
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    listed = [each async for each in messages(stub.ServerReflectionInfo(listing, metadata=root))]
    assert "lda.v1.LdaService" in {service.name for service in listed[0].list_services_response.service}
    assert await outcome(raw(client, "/lda.v1.LdaService/Nothing", metadata=root)) == "UNIMPLEMENTED"


@module_loop
async def test_the_scheme_is_read_in_any_case(client):
    """`bearer` is as good as `Bearer`, as RFC 9110 says."""
    assert await outcome(client.generate(metadata=(("authorization", f"bearer {TOKENS['alice']}"),))) == "OK"


@module_loop
async def test_the_refused_request_can_be_found_in_the_log(client, caplog):
    """The caller's request id comes back, and the log has it; no token is ever written there."""
    caplog.set_level(logging.INFO)
    refused = await failure(raw(client, CONTRACT[0], metadata=(("x-request-id", "mine"), *bearer("t-nobody"))))
    assert refused.trailing["x-request-id"] == "mine"
    assert any("mine" in each and "refused" in each for each in caplog.messages)
    assert "t-nobody" not in caplog.text


@module_loop
async def test_health_is_open(client):
    """A kubelet has no token: Check and Watch answer, and say no more than that the server serves."""
    assert {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"} == OPEN_METHODS
    assert await client.health_of() == "SERVING"
    watch = client.watch()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


@module_loop
async def test_the_client_sends_its_token_and_knows_the_refusals(client):
    """`lda_client` and `lda` reach a server with a token; without, both codes are `AccessDenied`."""
    target = f"127.0.0.1:{client.port}"
    async with AsyncLdaClient(target, token=TOKENS["alice"]) as alice:
        assert (await alice.model_pair()).after.model_id == MODEL
        assert (await alice.complete("hi", raw=True, max_new_tokens=2))[0].text == "ab"
        with pytest.raises(AccessDenied) as denied:
            await alice.score("p", "c", raw=True).gather()
    async with AsyncLdaClient(target) as nobody:
        with pytest.raises(AccessDenied) as unknown:
            await nobody.model_pair()
    assert (denied.value.code, unknown.value.code) == (
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
    )
    refused = await asyncio.to_thread(CliRunner().invoke, lda, ["info", "--target", target], env={"LDA_TOKEN": ""})
    assert refused.exit_code == 1
    assert "LDA_TOKEN" in refused.stderr
    assert MODEL not in refused.output


# Names of callers


@pytest.mark.parametrize("second", ["bob", "alice2"])
async def test_callers_are_counted_by_name(tmp_path, second):
    """Two tokens at one address have a limit each; two tokens of one name, as during a rotation, share one."""
    path = tmp_path / "tokens"
    path.write_text(token_lines() + line("alice", "t-alice2", "generate"))
    limit = AdmissionConfig(max_requests_per_caller=1)
    async with serving(access=AccessConfig(tokens_file=path), admission=limit) as (_, client):
        held = client.generate("hold", metadata=bearer(TOKENS["alice"]))
        await held.read()
        other = client.generate(metadata=bearer(f"t-{second}"))
        if second == "bob":
            assert await outcome(other) == "OK"
        else:
            assert (await failure(other)).reason == "CALLER_LIMIT"
        assert await callers(client, bearer(TOKENS["root"])) == ["alice"]
        held.cancel()


async def callers(client, metadata=None):
    """The names of those who have something open."""
    stub = admin_service_pb2_grpc.AdminServiceStub(client.channel)
    listed = await stub.ListGenerations(admin_pb.ListGenerationsRequest(), metadata=metadata, timeout=30)
    return [each.caller for each in listed.generations]


# The file of tokens


async def test_tokens_come_and_go_without_a_restart(tmp_path, caplog):
    """A token works once its line is there and no longer when it is gone; a broken file changes nothing, loudly."""
    path = tmp_path / "tokens"
    path.write_text(token_lines())
    made = CliRunner().invoke(cli.main, ["token", "new", "--scope", "generate", "--expires", "2999-01-01"])
    fresh = made.stderr.strip()
    assert made.exit_code == 0
    assert fresh not in made.stdout
    async with serving(access=AccessConfig(tokens_file=path)) as (_, client):

        async def code(token):
            return await outcome(client.generate(metadata=bearer(token)))

        assert (await code(fresh), await code(TOKENS["alice"])) == ("UNAUTHENTICATED", "OK")
        put(path, made.stdout)
        assert (await code(fresh), await code(TOKENS["alice"])) == ("OK", "UNAUTHENTICATED")
        for broken in (made.stdout + "bob nothing generate\n", "", "# nothing but a comment\n"):
            caplog.clear()
            put(path, broken)
            assert [await code(fresh) for _ in range(3)] == ["OK"] * 3
            assert sum("FORMER VERSION STAYS" in each for each in caplog.messages) == 1
        path.unlink()
        assert await code(fresh) == "OK"
        put(path, token_lines())
        assert (await code(fresh), await code(TOKENS["alice"])) == ("UNAUTHENTICATED", "OK")


async def test_refusals_are_counted(tokens_file):
    """A metric counts who was not let in, by reason."""
    async with serving(access=AccessConfig(tokens_file=tokens_file)) as (server, client):
        for _ in range(2):
            assert (await failure(client.lda.GetLoad(pb.GetLoadRequest(), timeout=30))).code == "UNAUTHENTICATED"
        registry = server.telemetry.metrics.registry
        counts = [
            registry.get_sample_value("lda_access_refused_total", {"reason": reason})
            for reason in ("UNAUTHENTICATED", "PERMISSION_DENIED")
        ]
    assert counts == [2, 0]


async def test_a_token_expires_while_the_server_runs(tmp_path):
    """The time of expiry is looked at in every call."""
    path = tmp_path / "tokens"
    path.write_text(token_lines())
    async with serving(ready=False, access=AccessConfig(tokens_file=path)) as (_, client):
        put(path, line("brief", "t-brief", "generate", (datetime.now(UTC) + timedelta(seconds=1)).isoformat()))
        codes = [await outcome(client.generate(metadata=bearer("t-brief")))]
        while codes[-1] == "UNAVAILABLE" and len(codes) < 100_000:
            codes.append(await outcome(client.generate(metadata=bearer("t-brief"))))
        assert set(codes) == {"UNAVAILABLE", "UNAUTHENTICATED"}, "LOADING for as long as the token held"


GOOD_HASH = sha256(b"t").hexdigest()
BROKEN_LINES = {
    "alice": "words",
    f"alice {GOOD_HASH}": "words",
    f"alice {GOOD_HASH} generate 2027-01-01 more": "words",
    f"a,b {GOOD_HASH} generate": "the name",
    "alice t-alice generate": "SHA-256",
    f"alice {GOOD_HASH} generate,all": "scopes are generate, score, admin",
    f"alice {GOOD_HASH} ,": "scopes are",
    f"alice {GOOD_HASH} generate tomorrow": "the expiry",
    f"alice {GOOD_HASH} generate 2027-01-01T00:00:00": "offset",
    f"bob {GOOD_HASH} generate\nalice {GOOD_HASH} generate": "already",
}


@pytest.mark.parametrize(("text", "fault"), BROKEN_LINES.items(), ids=BROKEN_LINES.values())
def test_a_broken_line_is_named(tmp_path, text, fault):
    """A server does not start with a file that it cannot read, and says which line and why."""
    path = tmp_path / "tokens"
    path.write_text(f"# comment\n{text}\n")
    number = 2 + text.count("\n")
    with pytest.raises(ConfigError, match=f"tokens, line {number}: .*{fault}"):
        make_server(access=AccessConfig(tokens_file=path))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_file_breaks_the_reader(data):
    """Whatever a file holds, it is tokens or a ConfigError."""
    try:
        found = token_file.parse(Source("tokens", data))
    except ConfigError:
        return
    assert found


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["a b", "--scope", "admin"], "the name"),
        (["#a", "--scope", "admin"], "the name"),
        (["a", "--scope", "admin", "--expires", "soon"], "the expiry"),
        (["a", "--scope", "everything"], "everything"),
        (["a"], "--scope"),
    ],
)
def test_token_refuses_what_no_line_can_hold(arguments, fault):
    """`lda-service token` makes lines that the server can read, or none."""
    result = CliRunner().invoke(cli.main, ["token", *arguments])
    assert result.exit_code == 2
    assert fault in result.stderr
    assert result.stdout == ""


# JSON web tokens

AUDIENCE, ISSUER = "lda", "https://issuer.test"
RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def public_pem(key):
    """The file of a public key."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def web_token(key=RSA_KEY, algorithm="RS256", headers=None, without=(), **claims):
    """A signed token, good unless told otherwise."""
    now = time.time()
    good = {"sub": "carol", "scope": "generate other", "aud": AUDIENCE, "iss": ISSUER, "exp": now + 600, "iat": now}
    kept = {name: value for name, value in (good | claims).items() if name not in without}
    return jwt.encode(kept, key, algorithm=algorithm, headers=headers)


def forged(header, key=b""):
    """A token with a signature of our own making."""
    claims = {"sub": "mallory", "scope": "generate", "aud": AUDIENCE, "iss": ISSUER, "exp": time.time() + 600}
    parts = [base64.urlsafe_b64encode(json.dumps(each).encode()).rstrip(b"=") for each in (header, claims)]
    signature = hmac.digest(key, b".".join(parts), "sha256") if key else b""
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


def jwk(key, kind, **fields):
    """A public key as it stands in a key set."""
    return {**kind.to_jwk(key.public_key(), as_dict=True), **fields}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def issued(folder, tokens_file):
    """A client of a server that takes web tokens beside its file of tokens."""
    path = folder / "issuer.pem"
    path.write_bytes(public_pem(RSA_KEY))
    access = AccessConfig(tokens_file=tokens_file, jwt_key_file=path, jwt_audience=AUDIENCE, jwt_issuer=ISSUER)
    async with serving(access=access) as (_, client):
        yield client


FORGED = {
    "expired": partial(web_token, exp=time.time() - 60),
    "no expiry": partial(web_token, without=("exp",)),
    "not yet": partial(web_token, nbf=time.time() + 600),
    "wrong audience": partial(web_token, aud="another"),
    "no audience": partial(web_token, without=("aud",)),
    "wrong issuer": partial(web_token, iss="https://else.test"),
    "no issuer": partial(web_token, without=("iss",)),
    "no subject": partial(web_token, without=("sub",)),
    "empty subject": partial(web_token, sub=""),
    "wrong key": partial(web_token, OTHER_RSA_KEY),
    "another kind of key": partial(web_token, EC_KEY, "ES256"),
    "alg none": partial(forged, {"alg": "none", "typ": "JWT"}),
    "alg missing": partial(forged, {"typ": "JWT"}),
    "public key as secret": partial(forged, {"alg": "HS256", "typ": "JWT"}, public_pem(RSA_KEY)),
    "public key, stripped": partial(forged, {"alg": "HS256", "typ": "JWT"}, public_pem(RSA_KEY).strip()),
    "alg as list": partial(forged, {"alg": ["RS256"]}),
    "kid as object": partial(forged, {"alg": "RS256", "kid": {"a": 1}}),
    "deep nesting": lambda: "W" * 4000 + ".e30.e30",
    "deep json": lambda: base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.e30",
    "endless expiry": partial(web_token, exp=float("inf")),
    "no signature": lambda: web_token().rpartition(".")[0] + ".",
    "changed claims": lambda: ".".join([*forged({"alg": "RS256"}).split(".")[:2], web_token().rpartition(".")[2]]),
}


@pytest.mark.parametrize("make", FORGED.values(), ids=FORGED)
@module_loop
async def test_a_web_token_that_is_not_good_opens_nothing(issued, make):
    """Signature, algorithm, time, audience, issuer and subject all count, and the answer names none of them."""
    for method in ("/lda.v1.LdaService/GenerateLDA", "/lda.v1.LdaService/GetModelPair", REFLECTION, *UNKNOWN):
        refused = await refusal(raw(issued, method, metadata=bearer(make())))
        assert (refused.code, refused.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")


@module_loop
async def test_a_good_web_token(issued):
    """It opens the scopes of its claim, its subject is the caller's name, and tokens of the file work beside it."""
    held = issued.generate("hold", metadata=bearer(web_token(sub="dave\n2026 forged line")))
    await held.read()
    assert await callers(issued, bearer(TOKENS["root"])) == ["dave?2026 forged line"]
    held.cancel()
    assert await outcome(issued.generate(metadata=bearer(web_token(algorithm="PS256")))) == "OK"
    for claims in ({"without": ("scope",)}, {"scope": ["generate"]}, {"scope": "generate-all"}):
        refused = await refusal(issued.generate(metadata=bearer(web_token(**claims))))
        assert (refused.code, refused.metadata) == ("PERMISSION_DENIED", {"scope": "generate"})


async def test_a_key_set_rotates(tmp_path, caplog):
    """The key id chooses the key; a new set holds from the next call on, and a broken one changes nothing."""
    path = tmp_path / "keys.json"
    first = jwk(RSA_KEY, jwt.algorithms.RSAAlgorithm, kid="1", alg="RS256", use="sig")
    second = jwk(EC_KEY, jwt.algorithms.ECAlgorithm, kid="2")
    third = jwk(ED_KEY, jwt.algorithms.OKPAlgorithm, kid="3")
    passed_over = {"kty": "oct", "kid": "4", "k": "c2VjcmV0"}
    encryption = jwk(OTHER_RSA_KEY, jwt.algorithms.RSAAlgorithm, kid="5", use="enc")
    path.write_text(json.dumps({"keys": [first, passed_over, encryption]}))
    async with serving(access=AccessConfig(jwt_key_file=path, jwt_audience=AUDIENCE)) as (_, client):

        async def code(*token, **fields):
            return await outcome(client.generate(metadata=bearer(web_token(*token, **fields))))

        one = partial(code, RSA_KEY, headers={"kid": "1"})
        two = partial(code, EC_KEY, "ES256", headers={"kid": "2"})
        assert (await one(), await two()) == ("OK", "UNAUTHENTICATED")
        assert await code(RSA_KEY, "RS512", headers={"kid": "1"}) == "UNAUTHENTICATED", "the set says RS256"
        assert await code(OTHER_RSA_KEY, headers={"kid": "5"}) == "UNAUTHENTICATED", "for encryption only"
        put(path, json.dumps({"keys": [second, third]}))
        assert (await one(), await two()) == ("UNAUTHENTICATED", "OK")
        assert await code(ED_KEY, "EdDSA", headers={"kid": "3"}) == "OK"
        assert await code(EC_KEY, "ES256") == "UNAUTHENTICATED", "two keys, and no id that says which"
        put(path, json.dumps({"keys": []}))
        assert (await one(), await two()) == ("UNAUTHENTICATED", "OK")
        assert "FORMER VERSION STAYS" in caplog.text


BAD_KEYS = {
    "private": private_pem(RSA_KEY),
    "private in a set": json.dumps({"keys": [jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY, as_dict=True)]}).encode(),
    "shared secret": b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}',
    "short": public_pem(rsa.generate_private_key(65537, 1024)),
    "unknown kind": b'{"keys": [{"kty": "OKP", "crv": "X25519", "x": "c2VjcmV0"}]}',
    "no json": b"{keys",
    "not a set": b'{"keys": 3}',
    "not keys": b'{"keys": [3]}',
    "nothing": b"",
}


@pytest.mark.parametrize("data", BAD_KEYS.values(), ids=BAD_KEYS)
def test_keys_that_cannot_be_used_are_refused_at_start(tmp_path, data):
    """Private, shared, short or broken keys: the server does not start, and says what to give."""
    path = tmp_path / "keys"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="public key"):
        make_server(access=AccessConfig(jwt_key_file=path, jwt_audience=AUDIENCE))


# TLS

SPIFFE = "spiffe://cluster.test/ns/lda/sa/"
FRESH = (("grpc.use_local_subchannel_pool", 1),)  # channels of one process share connections otherwise


@pytest.fixture(scope="module")
def authority(folder):
    """Whom the server and its callers trust."""
    return Authority(folder)


@pytest.fixture(scope="module")
def identities(authority):
    """Certificates of one server and of some callers."""
    return {
        "server": authority.issue("server", dns=["localhost"], ips=["127.0.0.1"]),
        "envoy": authority.issue("envoy", dns=["envoy.test"], uris=[SPIFFE + "envoy"]),
        "gateway": authority.issue("gateway", dns=["gateway.test"]),
        "plain": authority.issue("plain"),
    }


def tls_client(port, ca, identity=None):
    """A client over a connection of its own."""
    mine = (identity.key.read_bytes(), identity.cert.read_bytes()) if identity else (None, None)
    return Client(port, FRESH, grpc.ssl_channel_credentials(ca.read_bytes(), *mine))


@asynccontextmanager
async def calling(*args):
    """A `tls_client`, closed in the end."""
    client = tls_client(*args)
    try:
        yield client
    finally:
        await client.channel.close()


def tls(identities, authority=None, **fields):
    """A server with its certificate; with an authority, it asks callers for theirs."""
    server = identities["server"]
    return AccessConfig(tls_cert=server.cert, tls_key=server.key, tls_client_ca=authority and authority.cert, **fields)


async def no_connection(client):
    """That a client cannot even connect, and learns nothing."""
    refused = await failure(client.generate())
    assert refused.code == "UNAVAILABLE"
    assert MODEL not in repr(refused)
    return True


async def test_tls_with_a_token(identities, authority, tokens_file, tmp_path, caplog):
    """Over TLS a token works as in plain text; a caller in plain text, or one who trusts others, gets no connection."""
    async with serving(access=tls(identities, tokens_file=tokens_file)) as (_, plain):
        assert await no_connection(plain)
        async with calling(plain.port, Authority(tmp_path, "stranger").cert) as stranger:
            assert await no_connection(stranger)
        async with calling(plain.port, authority.cert) as client:
            assert await outcome(client.generate(metadata=bearer(TOKENS["alice"]))) == "OK"
            assert (await refusal(client.generate())).code == "UNAUTHENTICATED"
            assert await client.health_of() == "SERVING"
        environment = {"LDA_TOKEN": TOKENS["alice"], "LDA_TLS_CA": str(authority.cert), "COLUMNS": "100"}
        arguments = ["info", "--target", f"127.0.0.1:{plain.port}"]
        answer = await asyncio.to_thread(CliRunner().invoke, lda, arguments, env=environment)
        assert (answer.exit_code, MODEL in answer.stdout) == (0, True)


async def test_mtls_asks_for_a_certificate(identities, authority, tmp_path):
    """No certificate, or one of a stranger: no connection. One of ours: its names are the caller's."""
    stranger = Authority(tmp_path, "stranger").issue("stranger", uris=[SPIFFE + "envoy"])
    async with serving(access=tls(identities, authority)) as (_, plain):
        assert await no_connection(plain)
        for identity in (None, stranger):
            async with calling(plain.port, authority.cert, identity) as client:
                assert await no_connection(client)
        for name, caller in {"envoy": SPIFFE + "envoy", "gateway": "gateway.test", "plain": "plain"}.items():
            async with calling(plain.port, authority.cert, identities[name]) as client:
                held = client.generate("hold")
                await held.read()
                assert await callers(client) == [caller]
                held.cancel()
                assert await outcome(raw(client, "/lda.v1.LdaService/Nothing")) == "UNIMPLEMENTED"


@pytest.mark.parametrize("name", ["gateway", "plain"])
async def test_a_wrong_name_opens_nothing(identities, authority, name):
    """A certificate of ours without an allowed name is refused alike by every method, whatever was sent."""
    access = tls(identities, authority, tls_client_san=(SPIFFE + "envoy", "else.test"))
    async with serving(access=access) as (_, plain), calling(plain.port, authority.cert, identities[name]) as client:
        calls = [raw(client, method, message) for method in METHODS for message in MESSAGES.values()]
        first, *others = [await refusal(call) for call in calls]
        assert (first.code, first.reason, first.metadata) == ("PERMISSION_DENIED", "PERMISSION_DENIED", {})
        assert all(other == first for other in others)
        assert await client.health_of() == "SERVING"
        async with calling(plain.port, authority.cert, identities["envoy"]) as right:
            assert await outcome(right.generate()) == "OK"
            stub = reflection_pb2_grpc.ServerReflectionStub(right.channel)
            listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            assert [each async for each in messages(stub.ServerReflectionInfo(listing))]


async def test_a_certificate_does_not_replace_a_token(identities, authority, tokens_file):
    """Where both are asked for, both are needed, and the token names the caller."""
    access = tls(identities, authority, tokens_file=tokens_file, tls_client_san=("gateway.test",))
    async with serving(access=access) as (_, plain):
        async with calling(plain.port, authority.cert, identities["gateway"]) as client:
            assert (await refusal(client.generate())).code == "UNAUTHENTICATED"
            held = client.generate("hold", metadata=bearer(TOKENS["alice"]))
            await held.read()
            assert await callers(client, bearer(TOKENS["root"])) == ["alice"]
            held.cancel()
        async with calling(plain.port, authority.cert, identities["envoy"]) as client:
            assert (await refusal(client.generate(metadata=bearer(TOKENS["alice"])))).code == "PERMISSION_DENIED"


async def test_certificates_rotate_without_a_restart(authority, tmp_path, caplog):
    """New connections see the new certificate, open streams go on, and a broken pair of files changes nothing."""
    names = {"dns": ["localhost"], "ips": ["127.0.0.1"]}
    later = Authority(tmp_path, "later")
    (tmp_path / "in-force").mkdir()
    in_force = Authority(tmp_path / "in-force").issue("server", **names)
    in_force.replace(authority.issue("first", **names))
    second, unused = later.issue("second", **names), later.issue("unused", **names)
    access = AccessConfig(tls_cert=in_force.cert, tls_key=in_force.key)
    async with serving(access=access) as (_, plain), calling(plain.port, authority.cert) as old:
        held = old.generate("hold")
        await held.read()
        in_force.replace(second)
        async with calling(plain.port, later.cert) as new, calling(plain.port, authority.cert) as late:
            assert await outcome(new.generate()) == "OK"
            assert await no_connection(late)
        assert await outcome(old.generate()) == "OK", "on the connection that it has"
        for broken in (unused.key.read_bytes(), b"no key"):
            caplog.clear()
            put(in_force.key, broken)
            for _ in range(2):
                async with calling(plain.port, later.cert) as new:
                    assert await outcome(new.generate()) == "OK"
            assert sum("FORMER VERSION STAYS" in each for each in caplog.messages) == 1
        in_force.replace(unused)
        async with calling(plain.port, later.cert) as new:
            assert await outcome(new.generate()) == "OK"
        assert not held.done()
        held.cancel()


async def test_client_authorities_rotate_too(identities, authority, tmp_path):
    """An authority that is taken out of the file is no longer trusted by new connections."""
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(authority.cert.read_bytes())
    access = AccessConfig(tls_cert=identities["server"].cert, tls_key=identities["server"].key, tls_client_ca=trusted)
    async with serving(access=access) as (_, plain):
        async with calling(plain.port, authority.cert, identities["envoy"]) as client:
            assert await outcome(client.generate()) == "OK"
        put(trusted, Authority(tmp_path, "later").cert.read_bytes())
        async with calling(plain.port, authority.cert, identities["envoy"]) as client:
            assert await no_connection(client)


def test_certificates_that_cannot_be_used_are_refused_at_start(identities, tmp_path):
    """A missing file, a key of another certificate, no PEM: one sentence each, before anything listens."""
    server, other, broken = identities["server"], identities["envoy"], tmp_path / "broken"
    broken.write_bytes(b"-----BEGIN CERTIFICATE-----\nnothing\n")
    for cert, key, ca, sentence in (
        (tmp_path / "missing", server.key, None, "Cannot read .*missing: No such file"),
        (server.cert, tmp_path, None, "Cannot read .*directory"),
        (server.cert, other.key, None, "not that of the certificate"),
        (server.key, server.key, None, "no certificate in PEM"),
        (broken, server.key, None, "no certificate in PEM"),
        (server.cert, server.cert, None, "no private key"),
        (server.cert, server.key, broken, "no certificate in PEM"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_server(access=AccessConfig(tls_cert=cert, tls_key=key, tls_client_ca=ca))


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"TLS_CERT": "a"}, "TLS_KEY"),
        ({"TLS_KEY": "a"}, "TLS_CERT"),
        ({"TLS_CLIENT_CA": "a"}, "TLS_CERT"),
        ({"TLS_CERT": "a", "TLS_KEY": "b", "TLS_CLIENT_SAN": "c d"}, "TLS_CLIENT_CA"),
        ({"JWT_AUDIENCE": "a"}, "JWT_KEY_FILE"),
        ({"JWT_KEY_FILE": "a"}, "JWT_AUDIENCE"),
        ({"TOKENS_FILE": "/nowhere/tokens"}, "Cannot read /nowhere/tokens"),
    ],
)
def test_half_a_setting_is_a_mistake(environment, missing):
    """`lda-service serve` says which variable is missing, and exits with 1."""
    result = CliRunner().invoke(cli.main, ["serve"], env=environment)
    assert result.exit_code == 1
    assert missing in result.stderr


# Health checks of a secured server


async def probe(*arguments, **environment):
    """What `lda-service health` says."""
    result = await asyncio.to_thread(
        CliRunner().invoke, cli.main, ["health", *map(str, arguments)], env={"HEALTH_PORT": "", **environment}
    )
    return result.exit_code, result.stdout.strip()


async def test_health_command_reaches_a_secured_server(identities, authority):
    """With the files of a client it does; in plain text it does not."""
    envoy, port_of = identities["envoy"], lambda client: ("--port", client.port)
    trusting = ("--tls-ca", authority.cert)
    certified = ("--tls-cert", envoy.cert, "--tls-key", envoy.key)
    async with serving(access=tls(identities)) as (_, client):
        assert await probe(*port_of(client), *trusting) == (0, "SERVING")
        assert await probe(*port_of(client)) == (1, "UNAVAILABLE")
        assert await probe(*port_of(client), *trusting, "--tls-server-name", "localhost") == (0, "SERVING")
        assert await probe(*port_of(client), *trusting, "--tls-server-name", "else.test") == (1, "UNAVAILABLE")
    async with serving(access=tls(identities, authority)) as (_, client):
        assert await probe(*port_of(client), *trusting, *certified) == (0, "SERVING")
        assert await probe(*port_of(client), *trusting) == (1, "UNAVAILABLE")
        assert await probe(*port_of(client), *trusting, *certified[:2]) == (2, "")


async def test_health_port(identities, authority, tokens_file):
    """It answers health checks in plain text until the end, and knows no other method."""
    access = tls(identities, authority, tokens_file=tokens_file, health_port=0)
    async with serving(access=access) as (server, plain):
        assert await probe("--port", plain.port, HEALTH_PORT=str(server.health_port)) == (0, "SERVING")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel:
            others = [each for each in METHODS if "Health" not in each]
            codes = {await outcome(channel.unary_stream(method)(VALID, timeout=30)) for method in others}
            assert codes == {"UNIMPLEMENTED"}
            listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest(), timeout=30)
            assert set(listed.statuses) == {"", "lda.v1.LdaService"}
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="lda.v1.LdaService"), timeout=30
            )
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            begun = time.perf_counter()
            await server.drain_and_stop(10.0)
            assert time.perf_counter() - begun < 3
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await outcome(watch) == "UNAVAILABLE"


async def test_health_port_in_use():
    """A taken health port is an error that names its setting."""
    async with serving(ready=False) as (_, client):
        second = make_server(access=AccessConfig(health_port=client.port))
        with pytest.raises(PortInUse, match="--health-port"):
            await second.start()


# What the operator is told


async def test_a_public_bind_without_authentication_is_loud(caplog):
    """The log says it in a box, with the address; a bind on loopback is silent."""
    for host, boxes in (("127.0.0.1", 0), ("0.0.0.0", 1)):
        caplog.clear()
        async with serving(ready=False, host=host) as (_, client):
            told = [each for each in caplog.messages if "NO AUTHENTICATION" in each]
            assert len(told) == boxes
            assert all(f"*  {host}:{client.port} " in each for each in told)


@pytest.mark.parametrize(
    ("host", "fields", "told"),
    [
        ("0.0.0.0", {}, "NO AUTHENTICATION"),
        ("::", {}, "NO AUTHENTICATION"),
        ("gpu-host", {"tls_cert": "a", "tls_key": "b"}, "NO AUTHENTICATION"),
        ("10.0.0.3", {"tokens_file": "a"}, "readable"),
        ("10.0.0.3", {"jwt_key_file": "a", "jwt_audience": "b"}, "readable"),
        ("10.0.0.3", {"tokens_file": "a", "tls_cert": "a", "tls_key": "b"}, None),
        ("10.0.0.3", {"tls_cert": "a", "tls_key": "b", "tls_client_ca": "c"}, None),
        ("127.0.0.1", {}, None),
        ("127.0.0.2", {"tokens_file": "a"}, None),
        ("::1", {}, None),
        ("[::1]", {}, None),
        ("localhost", {}, None),
    ],
)
def test_exposure_is_told_where_there_is_one(caplog, host, fields, told):
    """A server that anybody reaches warns; one that sends tokens in plain text warns in a line; others do not."""
    tell_exposure(AccessConfig(**fields), host, 50051)
    assert len(caplog.messages) == (told is not None)
    assert (told or "") in caplog.text
    assert len({len(each) for each in caplog.text.splitlines() if each.startswith("*")}) <= 1, "a straight box"


# Limits of what is read at all


@module_loop
async def test_headers_and_messages_are_limited(client):
    """More metadata or a larger message than allowed ends the call before anybody looks at it; less does not."""
    token = bearer(TOKENS["alice"])
    assert await outcome(client.generate(metadata=(*token, ("x-note", "n" * 4096)))) == "OK"
    assert await outcome(client.generate(metadata=(*token, ("x-note", "n" * 20_000)))) == "RESOURCE_EXHAUSTED"
    async with serving(max_message_bytes=2048, access=AccessConfig()) as (_, small):
        assert await outcome(small.generate("p" * 1024)) == "OK"
        assert await outcome(small.generate("p" * 4096)) == "RESOURCE_EXHAUSTED"


@module_loop
async def test_a_large_message_says_nothing_to_strangers(client):
    """Without a token even a message above the limit gets the ordinary refusal: it is not read."""
    large = await refusal(raw(client, CONTRACT[0], b"x" * (5 << 20)))
    assert large == await refusal(raw(client, "/no.such.Service/Method"))


# Models


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    """A repository that brings code of its own is refused, and the code stays where it is."""
    model, ran = tmp_path / "model", tmp_path / "ran"
    save_model(model)
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "architectures": ["Evil"]}
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": "evil.T"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError):
        load_pair(PairConfig(str(model), str(model), device="cpu"))
    assert not ran.exists()
