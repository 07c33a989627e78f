"""One prompt and one seed at several alphas; alpha 0 is the after model itself. LDA_TARGET names the server."""

import os

from lda_client import LdaClient, pb

target = os.environ.get("LDA_TARGET", "127.0.0.1:50051")
texts = {}

# section:alpha_sweep
with LdaClient(target) as client:
    for alpha in (0, 0.5, 1):
        [completion] = client.complete("Who are you?", alpha=alpha, temperature=0, seed=1, diagnostics=True)
        kl = [token.diagnostics.after_before_kl for token in completion.tokens]
        print(f"alpha {alpha:g}, mean KL {sum(kl) / len(kl):.3f}: {completion.text}")
        # endsection:alpha_sweep
        texts[alpha] = completion.text

# section:both
with LdaClient(target) as client, client.generate_both("Who are you?", temperature=0, seed=1) as stream:
    both = stream.gather()
for completion in both:
    print(completion.role_name, completion.text)
# endsection:both

assert texts[0] == both.of_role(pb.MODEL_ROLE_AFTER)[0].text
print("ok")
