"""Static steps draw what ordinary steps draw: on the CPU, where the same code runs without graphs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_continuous_batching import BRANCHES, generations, make, outcome
from tiny_models import save_model
from torch.utils._python_dispatch import TorchDispatchMode

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.cuda_graph import Graphs
from lda_service.engine.engine import Engine
from lda_service.engine.fallback import Decoding
from lda_service.engine.lora import AdaptedRows
from lda_service.engine.pair import load_pair
from lda_service.engine.request import (
    Branch,
    GenerationRequest,
    Output,
    RequestFailed,
    Role,
    Sampling,
    SequenceDelta,
    SequenceFinished,
    Stopping,
)
from lda_service.engine.sampling import RowSampling
from lda_service.engine.static_decoder import wanted
from lda_service.engine.static_step import Bucket, StaticStep
from lda_service.errors import ConfigError

SHARED = tuple(b"A prompt that several rows share, longer than any window")
AMPLIFIED = (Branch(Role.AMPLIFIED, 1.5),)
LIMITS = dict(max_running_sequences=8, prefill_chunk_tokens=16)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def pair(request, tmp_path_factory):
    """Torch's operators, so that both ways share all but what is tested; windows and soft caps with gemma2."""
    return make_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", max_position_embeddings=600)


def make_pair(folder, architecture, **changes):
    for seed, side in enumerate(("after", "before")):
        save_model(folder / side, architecture, seed=seed + 1, **changes)
    return load_pair(PairConfig(str(folder / "after"), str(folder / "before"), device="cpu", native=False))


def engine_of(pair, static_step="on", **limits):
    return Engine(pair, EngineConfig(**{**LIMITS, **limits}, static_step=static_step))


def generation(name, prompt=SHARED, branches=AMPLIFIED, n=1, new=20, sampling=None, **rest):
    stopping = Stopping(new, ignore_eos=True)
    return GenerationRequest(
        name, tuple(prompt), branches, n, sampling or Sampling(0.0), rest.pop("stopping", stopping), **rest
    )


def run(engine, *requests, between=lambda engine, step: None):
    """Events by request, and that nothing is left."""
    for request in requests:
        engine.submit(request)
    events = []
    for step in itertools.count():
        between(engine, step)
        if not engine.has_work:
            break
        events += engine.step()
        engine.scheduler.check_integrity()
    engine.check_integrity()
    return {name: [e for e in events if e.request_id == name] for name in {e.request_id for e in events}}


def told(events):
    return {name: outcome(of_one) for name, of_one in events.items()}


def logprobs(events):
    return [record.logprob for e in events if isinstance(e, SequenceDelta) for record in e.tokens]


MIXED = [
    generation("greedy", n=2),
    generation("plain", n=3, sampling=Sampling(1.0, 1.0, seed=1)),
    generation("top-p", n=2, sampling=Sampling(0.7, 0.8, seed=2)),
    generation("top-k", b"xyz", sampling=Sampling(1.3, 1.0, 5, seed=3)),
    generation("min-p", b"other", sampling=Sampling(1.1, 0.95, 30, 0.02, 0.05, seed=4)),
    generation("both", b"one of each", (Branch(Role.AFTER, 0.0), Branch(Role.BEFORE, -1.0)), 2, 9, Sampling(seed=5)),
]


def test_mixed_requests_draw_the_same_tokens(pair):
    """Greedy and sampled rows with unlike settings, prompts shared and not, one model and both, joining and leaving."""
    wanted, got = (run(engine_of(pair, static), *MIXED) for static in ("off", "on"))
    assert told(got) == told(wanted)
    assert logprobs(got["top-p"]) == pytest.approx(logprobs(wanted["top-p"]), abs=1e-5)
    assert set(logprobs(got["greedy"])) == {None}


def test_the_static_path_is_taken(pair, monkeypatch):
    """The test above compares two paths, not one with itself: nearly all tokens come from static steps."""
    engine = engine_of(pair)
    ordinary = []
    decode = engine._decode
    monkeypatch.setattr(
        engine, "_decode", lambda decoded, started: (ordinary.extend(decoded), decode(decoded, started))
    )
    run(engine, *MIXED)
    assert not ordinary


def test_a_context_may_outgrow_its_bucket(llama, monkeypatch):
    """Rows that pass the end of their bucket's context go on in the next one."""
    monkeypatch.setattr("lda_service.engine.static_decoder.SMALLEST_CONTEXT", 16)
    request = generation("long", b"short", n=2, new=80, sampling=Sampling(1.0, 0.9, seed=6))
    engine = engine_of(llama)
    got, wanted = run(engine, request), run(engine_of(llama, "off"), request)
    assert {bucket.context for bucket in engine._static._steps} == {16, 32, 64, 128}
    assert told(got) == told(wanted)


def test_the_context_window_may_be_used_up(pair):
    """The last position of the window is reached, and not passed by the step ahead."""
    request = generation("full", SHARED, n=2, new=500)
    limits = dict(kv_cache_tokens=1000, page_tokens=1)
    wanted, got = (run(engine_of(pair, static, **limits), request) for static in ("off", "on"))
    assert told(got) == told(wanted)
    assert [e.output_tokens for e in got["full"] if isinstance(e, SequenceFinished)] == [128 - len(SHARED)] * 2


def test_evidence_is_drawn_in_ordinary_steps_beside_static_ones(pair):
    """Diagnostics, scores and bans come out the same while other rows go on in static steps."""
    requests = [
        generation("plain", n=2, sampling=Sampling(seed=1)),
        generation("diagnostics", sampling=Sampling(seed=2), output=Output(diagnostics=True, top_candidates=3)),
        generation("scores", b"abc", sampling=Sampling(seed=3), output=Output(score_alphas=(0.0, 2.0))),
        generation("least", b"abc", sampling=Sampling(seed=4), stopping=Stopping(15, min_new_tokens=6)),
    ]
    wanted, got = (run(engine_of(pair, static), *requests) for static in ("off", "on"))
    assert told(got) == told(wanted)
    [ended] = [e for e in got["scores"] if isinstance(e, SequenceFinished)]
    assert len(ended.alpha_scores) == 2


class NothingRead(TorchDispatchMode):
    """Fails on operators whose result the host waits for or whose shape hangs on values: no graph can hold them."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(self.FORBIDDEN), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype == torch.int64 for i in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
@pytest.mark.parametrize("candidates", [0, 16, None])
def test_a_step_reads_nothing_back(pair, candidates):
    """What a CUDA graph cannot hold is not in a step: no value read by the host, no shape that hangs on one."""
    static = engine_of(pair)._static
    if candidates is None:
        candidates = static.models.vocabulary
    step = StaticStep(static.models, static.sampler, Bucket(4, 64, candidates, (True, True)), None)
    step.run()  # the caches are made at their first use
    with NothingRead():
        step.run()
    assert step.positions.tolist() == [[2]] * 4
    assert step.results[2].all()


def test_the_guard_of_the_test_above_works(pair):
    """The ordinary step would be noticed."""
    static = engine_of(pair)._static
    logits = torch.zeros(2, static.models.vocabulary)
    rows = RowSampling(*(torch.ones(2) for _ in range(2)), torch.zeros(2).long(), *(torch.ones(2) for _ in range(3)),
                       *(torch.zeros(2).long() for _ in range(2)))  # fmt: skip
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingRead():
        static.sampler.draw(logits, logits, rows)


def test_a_step_that_cannot_be_captured_runs_all_the_same(monkeypatch, caplog):
    """The log says why, once, and later steps are not tried."""
    graphs = Graphs(torch.device("cpu"))
    graphs.works = True
    tried = []

    def fail(step):
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "_capture", fail)
    steps = [lambda: None, lambda: None]
    with caplog.at_level("WARNING"):
        assert [graphs.capture(step) for step in steps] == steps
    assert tried == steps[:1]
    assert "not permitted" in caplog.text


@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_too_few_candidates_are_noticed_and_the_token_drawn_anew(tmp_path, temperature):
    """Flat distributions over more ids than there are candidates: the same tokens, none lost or told twice."""
    pair = make_pair(tmp_path, "llama", vocab_size=288)
    requests = [
        generation("flat", n=3, sampling=Sampling(temperature, 0.99, seed=1)),
        generation("many", b"abc", sampling=Sampling(temperature, 0.999, 150, seed=2)),
        generation("sharp", b"abc", sampling=Sampling(0.0)),
    ]
    wanted = run(engine_of(pair, "off"), *requests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lda_service.engine.static_decoder.CANDIDATES", 4)
        engine = engine_of(pair)
        redrawn = count_calls(patch, engine._static, "redraw")
        got = run(engine, *requests)
    assert told(got) == told(wanted)
    assert 0 < len(redrawn) < 4 * 4, "each sequence asks for more a few times, not at every token"


def count_calls(patch, owner, name):
    calls, method = [], getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments: (calls.append(arguments), method(*arguments))[1])
    return calls


def test_one_step_runs_ahead(llama, monkeypatch):
    """The next step is launched before the host looks at what the last one drew, and rows that end waste one draw."""
    engine = engine_of(llama)
    log = []
    for name in ("launch", "follow", "outcomes"):
        method = getattr(engine._static, name)
        monkeypatch.setattr(
            engine._static, name, lambda *a, name=name, method=method: (log.append(name), method(*a))[1]
        )
    events = run(engine, generation("r", new=6))
    # Five tokens after the prompt's; the last is known to be the last, so nothing follows it.
    assert log == ["launch", *["follow", "outcomes"] * 4, "outcomes"]
    assert len(logprobs(events["r"])) == 6


def test_a_row_that_ends_by_surprise_gives_nothing_more(llama):
    """A stop id ends a row while its next token is on the way: neighbours and a newcomer on its pages go on."""
    free = generation("stops", new=30, sampling=Sampling(1.0, 1.0, seed=2))
    drawn = [
        record.token_id for e in run(engine_of(llama, "off"), free)["stops"] for record in getattr(e, "tokens", ())
    ]
    stopping = Stopping(30, ignore_eos=True, stop_token_ids=(drawn[8],))
    requests = [
        replace(free, stopping=stopping),
        generation("goes on", b"xyz", new=30, sampling=Sampling(seed=3)),
        generation("waits", b"later", n=3, new=30, sampling=Sampling(seed=4)),
    ]
    limits = dict(max_running_sequences=2, page_tokens=4, kv_cache_tokens=160)
    wanted, got = (run(engine_of(llama, static, **limits), *requests) for static in ("off", "on"))
    assert told(got) == told(wanted)
    [ended] = [e for e in got["stops"] if isinstance(e, SequenceFinished)]
    assert (ended.stop_token_id, ended.output_tokens) == (drawn[8], drawn.index(drawn[8]) + 1)


def test_a_cancelled_request_gives_nothing_more(llama):
    """Cancelled while its tokens are on the way; a request that comes then gets its rows, and its own tokens."""

    def between(engine, step):
        if step == 6:
            engine.cancel("goes")
            engine.submit(generation("comes", b"abc", n=4, sampling=Sampling(seed=9)))

    limits = dict(max_running_sequences=4, page_tokens=4)
    got = run(engine_of(llama, **limits), generation("goes", n=4, new=60), between=between)
    wanted = run(engine_of(llama, "off"), generation("comes", b"abc", n=4, sampling=Sampling(seed=9)))
    assert told(got)["comes"] == told(wanted)["comes"]
    assert not any(isinstance(e, SequenceFinished) for e in got["goes"])


def test_an_engine_whose_last_request_was_cancelled_starts_afresh(llama):
    """What was on its way when the engine became idle is not told later."""
    engine = engine_of(llama)
    run(engine, generation("goes"), between=lambda e, step: e.cancel("goes") if step == 5 else None)
    got = run(engine, generation("comes", b"abc"))
    assert told(got) == told(run(engine_of(llama, "off"), generation("comes", b"abc")))


def test_broken_logits_end_the_request(llama, monkeypatch):
    """NaN logits in a static step fail their request, and only it; what was drawn ahead of that is not told."""
    engine = engine_of(llama)
    runner = engine.models.runners[0]
    decode = runner.decode_static
    broken_from = len(SHARED) + 4
    monkeypatch.setattr(
        runner, "decode_static", lambda i, paged: torch.where(i.positions >= broken_from, torch.nan, decode(i, paged))
    )
    got = run(engine, generation("fine", b"abc"), generation("breaks"))
    assert told(got)["fine"] == told(run(engine_of(llama, "off"), generation("fine", b"abc")))["fine"]
    assert isinstance(got["breaks"][-1], RequestFailed)
    assert len(logprobs(got["breaks"])) == 5


def test_one_shape_for_all(llama):
    """A deterministic engine makes steps of one shape, whoever is there; tokens are as ever."""
    engine = engine_of(llama, deterministic=True)
    got = run(engine, *MIXED)
    assert {(b.rows, b.context, b.candidates) for b in engine._static._steps} == {(8, 600, llama.vocabulary_size)}
    assert told(got) == told(run(engine_of(llama, "off"), *MIXED))


def test_a_deterministic_engine_gives_ordinary_steps_no_company(llama, monkeypatch):
    """Where kernels round by shape: evidence is drawn row by row, and no request reads what another prefilled."""
    engine = engine_of(llama, deterministic=True)
    rows = []
    decode = engine.models.decode
    monkeypatch.setattr(engine.models, "decode", lambda sequences: (rows.append(len(sequences)), decode(sequences))[1])
    output = Output(score_alphas=(0.5,))
    requests = [generation(name, n=2, sampling=Sampling(seed=1), output=output) for name in "ab"]
    got = run(engine, *requests)
    assert set(rows) == {1}
    assert engine.scheduler.reused_tokens == 0
    assert told(got) == told(run(engine_of(llama, "off"), *requests))


def test_models_without_slots_take_ordinary_steps(llama):
    """An adapter, or a model that runs on transformers' own cache, excludes static steps whatever is asked for."""
    asked = EngineConfig(static_step="on")
    assert wanted(asked, llama)
    assert not wanted(asked, replace(llama, adapted_rows=AdaptedRows()))
    assert not wanted(asked, replace(llama, decoding=(Decoding.NATIVE, Decoding.CACHED)))


def test_a_step_ahead_has_its_page(llama):
    """Static steps write before the host knows a token is due: sequences take all their pages when they start."""
    engine = engine_of(llama, page_tokens=4)
    engine.submit(generation("r", new=20))
    while not engine.scheduler.running:
        engine.step()
    assert [sequence.table.capacity for sequence in engine.scheduler.running] == [20]


def test_few_steps_are_kept(llama, monkeypatch):
    """The step that was not used for longest makes room, and is made again when it is needed."""
    monkeypatch.setattr("lda_service.engine.static_decoder.KEPT_STEPS", 2)
    engine = engine_of(llama)
    got = run(engine, *MIXED)
    assert len(engine._static._steps) <= 2
    assert told(got) == told(run(engine_of(llama, "off"), *MIXED))


def test_static_steps_are_for_cuda_unless_asked_for(llama):
    """On a CPU, "auto" is as "off": no static decoder."""
    assert engine_of(llama, "auto")._static is None
    assert engine_of(llama, "on")._static is not None
    with pytest.raises(ConfigError, match="static_step"):
        EngineConfig(static_step="yes")


arrivals = st.lists(
    st.tuples(st.integers(0, 6), generations, st.one_of(st.none(), st.integers(1, 8))), min_size=1, max_size=5
)


@settings(max_examples=25, deadline=None)
@given(arrivals=arrivals, rows=st.integers(1, 6), pages=st.integers(12, 40), candidates=st.sampled_from([4, 256]))
def test_any_mix_in_static_steps_is_as_alone_in_ordinary_ones(llama, arrivals, rows, pages, candidates):
    """Requests that come and are cancelled at any step, rows and pages scarce, candidates too few or enough."""
    limits = dict(max_running_sequences=rows, page_tokens=4, kv_cache_tokens=pages * 4)
    requests = {f"r{i}": (at, make(f"r{i}", what), cancel) for i, (at, what, cancel) in enumerate(arrivals)}
    known, cancelled = set(), set()

    def between(engine, step):
        for name, (at, request, cancel) in requests.items():
            if at == step:
                try:
                    engine.submit(request)
                except Exception:
                    continue  # larger than this small cache
                known.add(name)
            elif cancel is not None and at + cancel == step:
                engine.cancel(name)
                cancelled.add(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lda_service.engine.static_decoder.CANDIDATES", candidates)
        engine = engine_of(llama, **limits)
        events = []
        for step in range(2000):
            between(engine, step)
            if step > 6 and not engine.has_work:
                break
            events += engine.step()
            engine.scheduler.check_integrity()
        engine.check_integrity()
    for name in known - cancelled:
        wanted = run(engine_of(llama, "off", max_running_sequences=16), requests[name][1])
        assert outcome([e for e in events if e.request_id == name]) == told(wanted)[name]


def test_branches_cover_what_static_steps_split():
    """The property above has rows of every kind: one model, the other, both."""
    assert {branch.alpha for branches in BRANCHES.values() for branch in branches} >= {-1.0, 0.0, 1.5}
