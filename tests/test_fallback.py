"""Models that the engine's cache does not fit are decoded all the same: slowly, rightly, and with a warning."""

from __future__ import annotations

import pytest
import torch
from test_engine import generation, of, run, tokens_of
from test_oracle import PROMPTS, Oracle, collect, engine_for, make_pair, request
from tiny_models import WITHOUT_SEAM
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaForCausalLM

from lda_service.config import PairConfig
from lda_service.engine.fallback import Decoding
from lda_service.engine.pair import load_pair
from lda_service.engine.request import Branch, Role, Sampling, ScoreBlock, ScoreRequest, Stopping
from lda_service.errors import ModelUnsupported

ALPHAS = (-1.0, 0.0, 1.0, 20.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def llamas(folders):
    return make_pair(folders, "llama")


def check_against_oracle(after, before):
    """Greedy tokens alone and in company, prompts in several chunks, equal those of transformers' plain passes."""
    engine = engine_for(after, before, max_running_sequences=3)
    oracle = Oracle(after, before, engine.pair.shared_ids, use_cache=False)
    expected = {f"{alpha}/{n}": oracle(PROMPTS[n], alpha) for alpha in ALPHAS for n in (1, 2)}
    engine.submit(request("1.0/2", PROMPTS[2], 1.0))
    assert collect(engine) == {"1.0/2": expected["1.0/2"]}
    for name in expected:
        alpha, n = name.split("/")
        engine.submit(request(name, PROMPTS[int(n)], float(alpha)))
    assert collect(engine) == expected
    engine.check_integrity()
    return engine.pair.decoding


@pytest.mark.parametrize("architecture", WITHOUT_SEAM)
def test_greedy_tokens_equal_the_oracle(folders, architecture, caplog):
    """Hybrids, recurrent models and those without the seam: transformers' own tokens, and a warning that names why."""
    with caplog.at_level("WARNING"):
        decoding = check_against_oracle(*make_pair(folders, architecture))
    assert Decoding.NATIVE not in decoding
    assert "decoded slowly: one sequence at a time" in caplog.text
    assert "cannot be replaced" in caplog.text or "keeps state" in caplog.text


@pytest.mark.parametrize("side", ["after", "before"])
def test_one_model_of_the_pair_may_be_native(folders, llamas, side):
    """A hybrid beside a Llama: each is decoded its own way, in lock-step."""
    hybrids = make_pair(folders, "lfm2")
    pair = (hybrids[0], llamas[1]) if side == "after" else (llamas[0], hybrids[1])
    expected = (Decoding.CACHED, Decoding.NATIVE)
    assert check_against_oracle(*pair) == (expected if side == "after" else expected[::-1])


def test_a_model_whose_cache_cannot_be_copied_starts_over_at_every_step(folders, monkeypatch):
    """No copy, no cache: the answer stays right."""

    def refuse(*_):
        raise TypeError("cannot be copied")

    after, before = make_pair(folders, "lfm2")
    for cache in (DynamicCache, Cache):
        monkeypatch.setattr(cache, "__deepcopy__", refuse, raising=False)
    assert check_against_oracle(after, before) == (Decoding.RECOMPUTED, Decoding.RECOMPUTED)


def test_rollouts_of_one_prompt_do_not_touch_each_others_state(folders):
    """Many sequences of one prompt, joined and cancelled under way: each draws what it draws alone."""
    engine = engine_for(*make_pair(folders, "lfm2"), max_running_sequences=3)
    alone = run(engine, generation(n=5))
    engine.submit(generation("victim", n=2, stopping=Stopping(60, ignore_eos=True)))
    for _ in range(4):
        engine.step()
    both = generation("both", branches=(Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0)), sampling=Sampling(0.0))
    engine.submit(both)
    engine.step()
    engine.cancel("victim")
    together = run(engine, generation(n=5))
    for index in range(5):
        assert tokens_of(together, index=index) == tokens_of(alone, index=index)


def test_scores_in_chunks(folders):
    """A score longer than a chunk gives the log-probabilities of one plain pass."""
    after, before = make_pair(folders, "lfm2")
    engine = engine_for(after, before)
    prompt, continuation = PROMPTS[1], PROMPTS[2]
    events = run(engine, ScoreRequest("s", prompt, continuation))
    records = [record for event in of(events, ScoreBlock) for record in event.tokens]
    ids = torch.tensor([prompt + continuation])
    for folder, name in ((after, "after_logprob"), (before, "before_logprob")):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(ids, use_cache=False).logits[0]
        allowed = torch.full(logits.shape[-1:], -torch.inf)
        allowed[list(engine.pair.shared_ids)] = 0
        logprobs = (logits + allowed).log_softmax(-1)[len(prompt) - 1 : -1]
        wanted = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()
        assert [getattr(record.diagnostics, name) for record in records] == pytest.approx(wanted, abs=1e-4)


def test_a_model_that_no_way_decodes_rightly_is_refused(llamas, monkeypatch):
    """If every pass says something else, nothing is served."""
    forward = LlamaForCausalLM.forward

    def noisy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits + torch.randn_like(output.logits) * 10
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", noisy)
    with pytest.raises(ModelUnsupported, match="other logits"):
        load_pair(PairConfig(*map(str, llamas), device="cpu"))
