"""Leave a long generation after three tokens; the server stops working on it. LDA_TARGET names the server."""

import os
import time

import grpc
from lda_client import LdaClient, pb
from lda_client.gen.lda.v1.lda_service_pb2_grpc import LdaServiceStub

FREED_S = 10.0
target = os.environ.get("LDA_TARGET", "127.0.0.1:50051")

# section:cancel
with LdaClient(target) as client, client.generate("Who are you?", max_new_tokens=400, ignore_eos=True) as stream:
    tokens = 0
    for event in stream:
        tokens += len(event.delta.tokens)
        if tokens >= 3:
            break
assert stream.cancelled
# endsection:cancel


def open_requests() -> int:
    """How many requests the server has open."""
    with grpc.insecure_channel(target) as channel:
        return LdaServiceStub(channel).GetLoad(pb.GetLoadRequest(), timeout=FREED_S).open_requests


deadline = time.monotonic() + FREED_S
while open_requests() and time.monotonic() < deadline:
    time.sleep(0.05)
assert open_requests() == 0
print("ok")
