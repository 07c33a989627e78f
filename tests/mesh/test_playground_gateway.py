"""The playground: `lda-service gateway` serves the built page at `/`, as it lies in the package, and nothing else."""

from __future__ import annotations

import asyncio
import re
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import pytest_asyncio
from mesh_harness import WAIT_S, Replica

from lda_service.envoy import CONTENT_TYPES, Front, bootstrap, tcp
from lda_service.gateway import PLAYGROUND

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILES = sorted(path for path in PLAYGROUND.rglob("*") if path.is_file())


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def server():
    started = await Replica({"http": 0}).start()
    yield started
    await started.kill()


async def get(server, path, method="GET"):
    """(headers, body) of what is served there."""
    request = Request(f"http://127.0.0.1:{server.http_port}{path}", method=method)

    def ask():
        with urlopen(request, timeout=WAIT_S) as response:
            return response.headers, response.read()

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.suffix)
async def test_every_file_is_served_as_it_is(server, file):
    """Each built file arrives byte for byte, as what it is, and with a policy that keeps the page to itself."""
    name = file.relative_to(PLAYGROUND).as_posix()
    headers, body = await get(server, "/" if name == "index.html" else f"/{name}")
    assert body == file.read_bytes()
    assert headers["content-type"] == CONTENT_TYPES[file.suffix]
    assert headers["content-security-policy"].startswith("default-src 'none';")
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


async def test_the_page_asks_for_files_that_are_there(server):
    """What the page refers to is served and may be kept for good; the page itself is asked for each time."""
    headers, body = await get(server, "/")
    assert headers["cache-control"] == "no-cache"
    names = re.findall(r'(?:src|href)="\./([^"]+)"', body.decode())
    assert {name.rpartition(".")[2] for name in names} >= {"js", "css"}
    for name in names:
        headers, _ = await get(server, f"/{name}")
        assert "immutable" in headers["cache-control"]


async def test_the_page_needs_nothing_from_elsewhere():
    """No built file names another host, but for the name of the vocabulary of SVG."""
    for file in FILES:
        hosts = set(re.findall(r"https?://([\w.-]+)", file.read_text()))
        assert hosts <= {"www.w3.org"}, file.name


async def test_other_paths_stay_what_they_were(server):
    """The list of paths is where it was; a path that nobody knows is 404, and so is a page that is not asked for."""
    _, body = await get(server, "/docs")
    assert b"/v1:generateLda" in body
    for path, method in (("/index.htm", "GET"), ("/", "POST")):
        with pytest.raises(HTTPError, match="404"):
            await get(server, path, method)


async def test_a_page_may_be_asked_for_its_headers_alone(server):
    """HEAD has the headers of GET and no body."""
    headers, body = await get(server, "/", "HEAD")
    assert (headers["cache-control"], body) == ("no-cache", b"")


async def test_a_front_without_the_folder_serves_no_page():
    """Other Envoys, as those of deploy/envoy, have no page at `/`."""
    config = bootstrap(Front("127.0.0.1", 0, "127.0.0.1", 1), tcp("127.0.0.1", 0), "lda.pb")
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert "/" not in [route["match"].get("path") for route in routes]
