"""Print a text as it arrives; its pieces add up to the whole. LDA_TARGET names the server."""

import os

from lda_client import LdaClient

target = os.environ.get("LDA_TARGET", "127.0.0.1:50051")
pieces = []

# section:stream
with LdaClient(target) as client, client.generate("Who are you?", alpha=0.5, seed=1) as stream:
    for _index, _role, text in stream.text():
        print(text, end="", flush=True)
        # endsection:stream
        pieces.append(text)

with LdaClient(target) as client:
    completions = client.complete("Who are you?", alpha=0.5, seed=1)
assert "".join(pieces) == completions[0].text
print("\nok")
