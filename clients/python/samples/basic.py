"""Complete two sequences and print them. LDA_TARGET names the server."""

# section:basic
import os

from lda_client import LdaClient

target = os.environ.get("LDA_TARGET", "127.0.0.1:50051")

with LdaClient(target) as client:
    completions = client.complete("Who are you?", alpha=0.5, num_sequences=2, seed=1)
for completion in completions:
    print(completion.sequence_index, completion.reason_name, completion.text)
# endsection:basic

assert len(completions) == 2
assert all(completion.finish_reason and completion.text for completion in completions)
print("ok")
