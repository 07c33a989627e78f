"""The native kernels against torch in double precision, what they promise about rows, and life without a compiler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_oracle import request
from tiny_models import save_model
from torch.nn.functional import rms_norm, silu

from lda_service.config import EngineConfig, PairConfig
from lda_service.engine import native
from lda_service.engine.engine import Engine
from lda_service.engine.native import Norm, Product
from lda_service.engine.pair import load_pair
from lda_service.engine.request import SequenceDelta

shapes = st.tuples(st.integers(1, 90), st.integers(1, 700), st.integers(1, 120))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def native_kernels():
    try:
        return native.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=dtypes, has_bias=st.booleans(), rows=st.integers(1, 20), seed=st.integers(0, 99))
def test_products_are_right_and_rows_do_not_see_each_other(native_kernels, shape, dtype, has_bias, rows, seed):
    """For any shape: equal to the product in double precision, and any row alone gives the same bits."""
    outputs, depth, more = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, depth, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator) if has_bias else None
    x = torch.randn(rows + more, depth, generator=generator)
    product = Product(native_kernels.pack(weight), bias)
    out = native_kernels.linear(x, product)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(out.double(), wanted, atol=2e-4, rtol=1e-4)
    assert torch.equal(native_kernels.linear(x[:rows], product), out[:rows])
    assert torch.equal(native_kernels.linear(x[-1:], product), out[-1:])


@settings(max_examples=40, deadline=None)
@given(inner=st.integers(1, 70), width=st.integers(1, 70), rows=st.integers(1, 20), dtype=dtypes)
def test_gated_mlp(native_kernels, inner, width, rows, dtype):
    """down(silu(gate(x)) * up(x)) as in double precision, for any widths."""
    generator = torch.Generator().manual_seed(inner * 71 + width)
    gate, up = (torch.randn(inner, width, generator=generator).to(dtype) for _ in range(2))
    down = torch.randn(width, inner, generator=generator).to(dtype)
    x = torch.randn(rows, width, generator=generator)
    out = native_kernels.gated_mlp(x, *(Product(native_kernels.pack(w), None) for w in (gate, up, down)))
    wanted = (silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)) @ down.double().T
    torch.testing.assert_close(out.double(), wanted, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("width", [1, 7, 64, 771])
def test_rms_norm(native_kernels, width, offset):
    """As torch's own, for widths that no vector divides too."""
    x, weight = torch.randn(5, width), torch.randn(width)
    out = native_kernels.rms_norm(x, Norm(weight, offset, 1e-6))
    wanted = rms_norm(x.double(), (width,), (weight + offset).double(), 1e-6)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_the_engine_runs_and_says_what_that_costs(tmp_path, monkeypatch, caplog):
    """No compiler on the machine: the log names the reason and the remedy, and greedy tokens are the same."""
    folders = [save_model(tmp_path / side, seed=seed) for seed, side in enumerate(("after", "before"))]
    config = PairConfig(*map(str, folders), device="cpu")
    wanted = tokens(load_pair(config))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.load.cache_clear()
    try:
        with caplog.at_level("INFO"):
            pair = load_pair(config)
    finally:
        native.load.cache_clear()
    assert pair.backend.kernels is None
    assert "no C compiler" in caplog.text
    assert "install a C compiler" in caplog.text
    assert tokens(pair) == wanted


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    """A compiler that cannot build the kernels makes them unavailable, with its own words."""
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    native.load.cache_clear()
    try:
        with pytest.raises(native.Unavailable, match="out of luck"):
            native.load()
    finally:
        native.load.cache_clear()


def tokens(pair):
    """Greedy tokens of one request."""
    engine = Engine(pair, EngineConfig())
    engine.submit(request("r", tuple(b"The compiler"), 1.5))
    found = []
    while engine.has_work:
        found += [t.token_id for e in engine.step() if isinstance(e, SequenceDelta) for t in e.tokens]
    return found
