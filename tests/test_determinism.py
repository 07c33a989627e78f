"""`deterministic`: the same bits alone and in any company. Without it only the noise is promised, and that always."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, save_model

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import Branch, GenerationRequest, Role, Sampling, SequenceDelta, Stopping
from lda_service.errors import ConfigError

TOKENIZER = byte_tokenizer()
PROMPT = tuple(TOKENIZER.encode("The company of others"))
STOPPING = Stopping(12, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama-float32", "llama-bfloat16", "gemma2-float32"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    architecture, dtype = request.param.split("-")
    for seed, side in enumerate(("after", "before")):
        save_model(folder / side, architecture, seed=seed, dtype=getattr(torch, dtype))
    return load_pair(PairConfig(str(folder / "after"), str(folder / "before"), device="cpu"))


def request(name, prompt=PROMPT, n=1, seed=0, top_p=1.0, alpha=1.0):
    sampling = Sampling(1.0, top_p, seed=seed)
    return GenerationRequest(name, prompt, (Branch(Role.AMPLIFIED, alpha),), n, sampling, STOPPING)


def run(engine, arrivals):
    """(token, log-probability) of every sequence of the request "r", by index; requests arrive at their steps."""
    told: dict = {}
    step = 0
    while step <= max(at for at, _ in arrivals) or engine.has_work:
        for at, what in arrivals:
            if at == step:
                engine.submit(what)
        step += 1
        for event in engine.step():
            if isinstance(event, SequenceDelta) and event.request_id == "r":
                told.setdefault(event.sequence_index, []).extend((t.token_id, t.logprob) for t in event.tokens)
    return told


neighbours = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.builds(
            dict,
            prompt=st.sampled_from([PROMPT, PROMPT[:16], PROMPT[:17] + PROMPT[:9], PROMPT[3:9]]),
            n=st.integers(1, 9),
            seed=st.integers(0, 9),
            top_p=st.sampled_from([0.9, 1.0]),
            alpha=st.sampled_from([-1.0, 0.0, 2.0]),
        ),
    ),
    max_size=4,
)


@settings(max_examples=15, deadline=None)
@given(arrivals=neighbours, at=st.integers(0, 9), n=st.integers(1, 6), chunk=st.integers(3, 40), top_p=st.just(0.9))
def test_tokens_and_logprobs_are_the_same_bits_in_any_company(pair, arrivals, at, n, chunk, top_p):
    """Whoever else decodes, shares the prompt or a part of it, and however prompts are cut: tokens and their
    log-probabilities are bit-equal to those of the request alone.
    """
    alone = run(Engine(pair, EngineConfig(deterministic=True)), [(0, request("r", n=n, top_p=top_p))])
    engine = Engine(pair, EngineConfig(deterministic=True, prefill_chunk_tokens=chunk))
    others = [(when, request(f"n{i}", **what)) for i, (when, what) in enumerate(arrivals)]
    assert run(engine, [*others, (at, request("r", n=n, top_p=top_p))]) == alone
    engine.check_integrity()


def test_refused_where_it_cannot_be_kept(pair):
    """On operators whose results depend on the batch the mode is refused at start-up, with the way out."""
    slow = load_pair(PairConfig(*_folders(pair), device="cpu", native=False))
    with pytest.raises(ConfigError, match="--deterministic"):
        Engine(slow, EngineConfig(deterministic=True))


def _folders(pair):
    return pair.after.name_or_path, pair.before.name_or_path


def test_noise_never_depends_on_company(pair):
    """Without the mode, a sequence draws from the same noise alone and in company: in float32 the same tokens."""
    if pair.info.after.dtype != "float32":
        pytest.skip("near ties may fall either way in 16 bits")
    alone = run(Engine(pair, EngineConfig()), [(0, request("r", n=2))])
    crowd = run(Engine(pair, EngineConfig()), [(0, request("n", PROMPT[:9], n=7)), (2, request("r", n=2))])
    tokens = lambda told: {index: [token for token, _ in pairs] for index, pairs in told.items()}
    assert tokens(crowd) == tokens(alone)
