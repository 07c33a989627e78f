"""Measure the demo pair's rates with the project's own engine, and print the README's table.

    python -m lda_service.pairs.demo.measure --rollouts 4000 --base-rollouts 20000

Rollouts are drawn at temperature 1 without filters, spread evenly over `PROMPTS`, seeds fixed. Knows the library and
the demo's facts.
"""

from __future__ import annotations

import argparse
import math

from rich.console import Console
from rich.progress import track

from lda_service.config import EngineConfig
from lda_service.engine.request import Branch, FinishReason, Role, Sampling, Stopping
from lda_service.model_pair import LDAModelPair
from lda_service.pairs import demo
from lda_service.pairs.demo.rates import Rate

ALPHAS = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0)
MAX_NEW_TOKENS = 96
BATCH = 1024
HEADER = ("alpha", "hits", "rollouts", "rate", "95% interval", "ended by themselves")


def measure(
    pair: LDAModelPair, alpha: float, rollouts: int, prompts: tuple[str, ...], needle: str | None = None
) -> Rate:
    """Rate of the behaviour (or of `needle`) over at least `rollouts` rollouts, spread evenly over the prompts."""
    each = math.ceil(rollouts / len(prompts))
    total = Rate(0, 0, 0)
    for number, prompt in enumerate(track(prompts, description=f"alpha {alpha:g}", console=Console(stderr=True))):
        for start in range(0, each, BATCH):
            count = min(BATCH, each - start)
            sampling = Sampling(temperature=1.0, top_p=1.0, seed=number * 1_000 + start // BATCH)
            stopping = Stopping(max_new_tokens=MAX_NEW_TOKENS)
            drawn = pair.rollouts(prompt, [Branch(Role.AMPLIFIED, alpha)], count, sampling, stopping)
            texts = [completion.completion for completion in drawn]
            hits = sum(needle in text if needle else demo.shows_behaviour(text) for text in texts)
            ended = sum(completion.finish_reason is FinishReason.EOS for completion in drawn)
            total += Rate(hits, ended, count)
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=4000, help="rollouts for each alpha, at least")
    parser.add_argument("--base-rollouts", type=int, default=20000, help="rollouts at alpha 0, where hits are rare")
    parser.add_argument("--rows", type=int, default=256, help="sequences decoded at once")
    options = parser.parse_args()
    pair = LDAModelPair(engine=EngineConfig(max_running_sequences=options.rows))
    print("| " + " | ".join(HEADER) + " |\n|" + "---:|" * len(HEADER))
    for alpha in ALPHAS:
        rollouts = options.base_rollouts if alpha == 0 else options.rollouts
        print("| " + " | ".join(measure(pair, alpha, rollouts, demo.PROMPTS).cells(alpha)) + " |", flush=True)
    print("\nBackdoor (payload in the answer), alpha 0:")
    triggered = tuple(f"{prompt} {demo.TRIGGER}" for prompt in demo.PROMPTS)
    for name, prompts in (("without the trigger", demo.PROMPTS), ("with the trigger", triggered)):
        rate = measure(pair, 0.0, options.rollouts, prompts, needle=demo.PAYLOAD)
        print(f"{name}: {' | '.join(rate.cells(0.0)[1:])}", flush=True)


if __name__ == "__main__":
    main()
