"""Greedy tokens against an independent oracle: transformers' generate() with its two-model guidance processor."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, save_model
from transformers import AutoModelForCausalLM, LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import Branch, GenerationRequest, Role, Sampling, SequenceDelta, Stopping

ALPHAS = (-1.0, -0.5, 0.0, 0.3, 1.0, 3.0, 20.0)
NEW_TOKENS = 12
PROMPTS = (tuple(b"The quick brown fox"), tuple(b"One"), tuple(b"A much longer prompt, past any sliding window"))


class SharedIdsOnly:
    """A logits processor that rules out ids the pair does not share, as the written policy says."""

    def __init__(self, shared: tuple[int, ...]):
        self.shared = list(shared)

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        out[:, self.shared] = scores[:, self.shared]
        return out


class Oracle:
    """Greedy continuations by transformers alone, in float32, one prompt at a time. `rows` cuts unlike widths."""

    def __init__(self, after_dir, before_dir, shared, rows=None, use_cache=True):
        self.use_cache = use_cache
        self.after, self.before = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (after_dir, before_dir)
        )
        self.shared = shared
        if rows is not None:
            for model in (self.after, self.before):
                head = model.get_output_embeddings()
                head.weight = torch.nn.Parameter(head.weight[:rows])

    def __call__(self, prompt, alpha):
        """New token ids."""
        ids = torch.tensor([prompt])
        guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            1 + alpha, self.before, unconditional_ids=ids, use_cache=self.use_cache
        )
        out = self.after.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=self.use_cache,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([guidance, SharedIdsOnly(self.shared)]),
        )
        return out[0, len(prompt) :].tolist()


def request(name, prompt, alpha, new=NEW_TOKENS):
    stopping = Stopping(max_new_tokens=new, ignore_eos=True)
    return GenerationRequest(name, prompt, (Branch(Role.AMPLIFIED, alpha),), 1, Sampling(temperature=0), stopping)


def collect(engine, steps=None):
    """Token ids by request, until the engine is idle or `steps` are done."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work and (steps is None or steps > 0):
        for event in engine.step():
            if isinstance(event, SequenceDelta):
                tokens.setdefault(event.request_id, []).extend(record.token_id for record in event.tokens)
        steps = None if steps is None else steps - 1
    return tokens


def engine_for(after, before, **limits):
    config = EngineConfig(prefill_chunk_tokens=16, **limits)
    return Engine(load_pair(PairConfig(str(after), str(before), device="cpu", dtype="float32")), config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


def make_pair(folders, name, **before_changes):
    after, before = folders / f"{name}-after", folders / f"{name}-before"
    if not after.exists():
        save_model(after, name, seed=1)
        save_model(before, name, seed=2, **before_changes)
    return after, before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_the_oracle_alone_and_in_a_batch(folders, architecture):
    """For every architecture and alpha, greedy tokens equal transformers' own; alone, and all together in one batch."""
    after, before = make_pair(folders, architecture)
    engine = engine_for(after, before)
    oracle = Oracle(after, before, engine.pair.shared_ids)
    expected = {
        f"{alpha}/{n}": oracle(prompt, alpha)
        for alpha in ALPHAS
        for n, prompt in enumerate(PROMPTS[:2] if alpha != 1.0 else PROMPTS)
    }
    for name in ("1.0/2", "20.0/0", "-1.0/1"):
        alpha, n = name.split("/")
        engine.submit(request(name, PROMPTS[int(n)], float(alpha)))
        assert collect(engine)[name] == expected[name]
    for name in expected:
        alpha, n = name.split("/")
        engine.submit(request(name, PROMPTS[int(n)], float(alpha)))
    assert collect(engine) == expected
    engine.check_integrity()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_greedy_tokens_are_the_same_joined_late_and_after_a_cancel(folders, architecture):
    """A request that joins running ones, and whose neighbour is cancelled under way, decodes what it decodes alone."""
    after, before = make_pair(folders, architecture)
    engine = engine_for(after, before, max_running_sequences=4)
    oracle = Oracle(after, before, engine.pair.shared_ids)
    expected = {f"late{n}": oracle(prompt, 3.0) for n, prompt in enumerate(PROMPTS)}
    engine.submit(request("victim", PROMPTS[2], 0.7, new=60))
    engine.submit(request("long", PROMPTS[0], -0.2, new=60))
    collect(engine, steps=6)
    for n, prompt in enumerate(PROMPTS):
        engine.submit(request(f"late{n}", prompt, 3.0))
    tokens = collect(engine, steps=4)
    engine.cancel("victim")
    for name, more in collect(engine).items():
        tokens.setdefault(name, []).extend(more)
    assert {name: tokens[name] for name in expected} == expected
    engine.check_integrity()


@pytest.mark.parametrize("alpha", [-0.5, 0.3, 3.0])
def test_pairs_of_unlike_size_and_unlike_padding(folders, alpha):
    """A small Qwen-2 against a larger Llama with another number of padded output rows: same tokens as the oracle."""
    after = save_model(folders / f"unlike-after-{alpha}", "llama", seed=3, vocab_size=320)
    before = save_model(
        folders / f"unlike-before-{alpha}", "qwen2", seed=4, vocab_size=264, hidden_size=64, num_hidden_layers=3
    )
    engine = engine_for(after, before)
    assert engine.pair.vocabulary_size == 260
    oracle = Oracle(after, before, engine.pair.shared_ids, rows=engine.pair.vocabulary_size)
    for n, prompt in enumerate(PROMPTS):
        engine.submit(request(str(n), prompt, alpha))
    assert collect(engine) == {str(n): oracle(prompt, alpha) for n, prompt in enumerate(PROMPTS)}
