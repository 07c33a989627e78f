"""What only a GPU can show: CUDA graphs, two streams, torch's paged kernel."""

from __future__ import annotations

import pytest
import torch
from test_static_step import MIXED, run, told
from tiny_models import save_model

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine.engine import Engine
from lda_service.engine.paged_attention import Kind, find_kernel
from lda_service.engine.pair import load_pair
from lda_service.engine.static_step import Bucket, StaticStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def folders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for seed, side in enumerate(("after", "before")):
        save_model(folder / side, request.param, seed=seed + 1)
    return folder


def engine_of(folders, static_step="auto", dtype="float32", **limits):
    pair = load_pair(PairConfig(str(folders / "after"), str(folders / "before"), device="cuda", dtype=dtype))
    return Engine(pair, EngineConfig(max_running_sequences=8, static_step=static_step, **limits))


def test_graphs_draw_what_ordinary_steps_draw(folders):
    """Mixed requests in float32; every step was captured."""
    engine = engine_of(folders)
    got = run(engine, *MIXED)
    assert engine._static._graphs.works, "no step could be captured"
    assert told(got) == told(run(engine_of(folders, "off"), *MIXED))


def test_graphs_draw_what_the_same_steps_draw_kernel_by_kernel(folders):
    """In 16 bits too, paged kernel included where it passed its check."""
    without = engine_of(folders, dtype="bfloat16")
    without._static._graphs.works = False
    assert told(run(engine_of(folders, dtype="bfloat16"), *MIXED)) == told(run(without, *MIXED))


def test_company_changes_nothing_in_one_shape(folders):
    """`deterministic`: bfloat16 rows draw the same tokens alone and in company."""
    together = run(engine_of(folders, dtype="bfloat16", deterministic=True), *MIXED)
    for request in MIXED:
        alone = run(engine_of(folders, dtype="bfloat16", deterministic=True), request)
        assert told(alone)[request.request_id] == told(together)[request.request_id]


@torch.inference_mode()
def test_two_streams_give_the_logits_of_one(folders):
    """Fork and join wait for each other, again and again."""
    static = engine_of(folders)._static
    step = StaticStep(static.models, static.sampler, Bucket(8, 64, 0, (True, True)), None)
    assert step.side_stream is not None
    for _ in range(20):
        step.run()
    forked = step._logits()
    step.side_stream = None
    for side, alone in zip(forked, step._logits(), strict=True):
        assert torch.equal(side, alone)


def test_the_paged_kernel_passes_its_check():
    """If not, rows gather their context, and the log says why: then read that here."""
    kinds = {Kind(torch.bfloat16, *shape) for shape in ((8, 8, 64), (8, 2, 64), (32, 8, 128))}
    kernel = find_kernel(torch.device("cuda"), 256, kinds)
    assert kernel is not None
    assert kernel.layouts.keys() == kinds
