"""Requests that come, go and are cancelled in any order decode what they decode alone; nothing is lost or left over."""

from __future__ import annotations

import pytest
from forced_policy import Forced
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, save_model

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Admitted,
    Branch,
    GenerationRequest,
    Output,
    RequestFailed,
    Role,
    Sampling,
    ScoreBlock,
    ScoreRequest,
    SequenceDelta,
    SequenceFinished,
    Stopping,
)

TOKENIZER = byte_tokenizer()
BRANCHES = {
    "amplified": (Branch(Role.AMPLIFIED, 1.5),),
    "after": (Branch(Role.AMPLIFIED, 0.0),),
    "before": (Branch(Role.AMPLIFIED, -1.0),),
    "both": (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0)),
}

generations = st.builds(
    dict,
    prompt=st.text("abc \u00e9\u6708", min_size=1, max_size=25),
    branches=st.sampled_from(sorted(BRANCHES)),
    n=st.integers(1, 5),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_p=st.sampled_from([0.8, 1.0]),
        top_k=st.sampled_from([0, 20]),
        plausibility=st.sampled_from([0.0, 0.05]),
        seed=st.integers(0, 2**64 - 1),
    ),
    stopping=st.builds(
        Stopping,
        max_new_tokens=st.integers(1, 15),
        min_new_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_strings=st.sampled_from([(), ("a",), ("\u00e9b", "c ")]),
    ),
    output=st.builds(Output, diagnostics=st.booleans(), score_alphas=st.sampled_from([(), (0.0, 2.0)])),
)
scores = st.builds(
    dict, prompt=st.text("abc", min_size=1, max_size=9), continuation=st.text("xyz", min_size=1, max_size=30)
)
arrivals = st.lists(
    st.tuples(st.integers(0, 6), st.one_of(generations, scores), st.one_of(st.none(), st.integers(1, 8))),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_model(folder / "after", "olmo2", seed=1)
    save_model(folder / "before", "mistral", seed=2)
    return load_pair(PairConfig(str(folder / "after"), str(folder / "before"), device="cpu"))


def make(name, settings_):
    ids = tuple(TOKENIZER.encode(settings_["prompt"]))
    if "continuation" in settings_:
        return ScoreRequest(name, ids, tuple(TOKENIZER.encode(settings_["continuation"])), 0.5, 2, (0.0, 1.0))
    rest = (settings_["n"], settings_["sampling"], settings_["stopping"], settings_["output"])
    return GenerationRequest(name, ids, BRANCHES[settings_["branches"]], *rest)


def outcome(events):
    """What a caller could tell from the events of one request, by sequence."""
    told: dict = {}
    for event in events:
        if isinstance(event, SequenceDelta):
            text, ids = told.get((event.role, event.sequence_index), ("", ()))
            told[event.role, event.sequence_index] = (text + event.text, ids + tuple(t.token_id for t in event.tokens))
        elif isinstance(event, SequenceFinished):
            ending = (event.reason, event.output_tokens, event.stop_string)
            told["end", event.role, event.sequence_index] = ending
        elif isinstance(event, ScoreBlock):
            assert event.offset == len(told.get("score", ()))
            told["score"] = told.get("score", ()) + tuple(token.token_id for token in event.tokens)
            told["complete"] = event.is_last
    return told


def alone(pair, request):
    engine = Engine(pair, EngineConfig(prefill_chunk_tokens=7, max_running_sequences=16))
    engine.submit(request)
    events = []
    while engine.has_work:
        events += engine.step()
    return outcome(events)


@settings(max_examples=40, deadline=None)
@given(
    arrivals=arrivals,
    rows=st.integers(1, 6),
    chunk=st.integers(1, 20),
    pages=st.integers(12, 40),
    drafts=st.lists(st.sampled_from([0, 2, 3, 6]), max_size=3),
)
def test_company_changes_nothing(pair, arrivals, rows, chunk, pages, drafts):
    """Any mix of generations and scores, arriving and cancelled at any step, with rows and pages scarce, one token a
    step or blocks of coupled speculation.
    """
    limits = EngineConfig(
        prefill_chunk_tokens=chunk,
        max_running_sequences=rows,
        page_tokens=4,
        kv_cache_tokens=pages * 4,
        speculation="coupled" if drafts else "off",
    )
    engine = Engine(pair, limits)
    engine.policy = Forced(*drafts)
    requests = {f"r{i}": (at, make(f"r{i}", what), cancel) for i, (at, what, cancel) in enumerate(arrivals)}
    events = {name: [] for name in requests}
    refused, cancelled = set(), set()
    for step in range(2000):
        for name, (at, request, cancel) in requests.items():
            if at == step:
                try:
                    engine.submit(request)
                except Exception:
                    refused.add(name)  # larger than this small cache
            elif cancel is not None and at + cancel == step:
                engine.cancel(name)
                cancelled.add(name)
        if step > 6 and not engine.has_work:
            break
        for event in engine.step():
            assert event.request_id not in cancelled, "an event after the cancel"
            events[event.request_id].append(event)
        engine.scheduler.check_integrity()
    assert not engine.has_work
    engine.check_integrity()
    for name in requests.keys() - refused:
        assert not any(isinstance(event, RequestFailed) for event in events[name])
        told, wanted = outcome(events[name]), alone(pair, requests[name][1])
        if name in cancelled and (told.keys() != wanted.keys() or told.get("complete") is False):
            continue  # cancelled before its end: what came until then is a beginning
        assert isinstance(events[name][0], Admitted)
        assert told == wanted


def test_the_property_can_fail(pair, monkeypatch):
    """The test above notices a row that sees its neighbour: with positions off by one for company, outcomes differ."""
    engine = Engine(pair, EngineConfig())
    runner = engine.models.runners[0]
    decode = runner.decode
    monkeypatch.setattr(runner, "decode", lambda rows, inputs, **options: decode(rows, inputs, **options).roll(1, 0))
    names = ("one", "two")
    requests = [
        make(
            name,
            {
                "prompt": f"ab {name}",
                "branches": "amplified",
                "n": 1,
                "sampling": Sampling(0.0),
                "stopping": Stopping(8, ignore_eos=True),
                "output": Output(),
            },
        )
        for name in names
    ]
    for request in requests:
        engine.submit(request)
    events = []
    while engine.has_work:
        events += engine.step()
    assert outcome([e for e in events if e.request_id == "one"]) != alone(pair, requests[0])
