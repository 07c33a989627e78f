"""What `lda-service doctor --plan` computes, against models that exist and arithmetic done by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from lda_service.cli import main
from lda_service.engine.memory import token_bytes
from lda_service.errors import ModelNotFound
from lda_service.pairs import demo
from lda_service.sizing import GIB, MACHINES, USABLE_SHARE, Load, Machine, ModelSize, measure, plan

DEMO = Path(demo.__file__).parent
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


def folder_of(tmp_path, **values):
    """A folder with a configuration and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    return str(tmp_path)


@pytest.mark.parametrize("side", ["after", "before"])
def test_counts_are_those_of_the_loaded_model(side, tmp_path):
    """Parameters, bytes and keys and values per token, told from config.json alone, equal those of the real weights."""
    shutil.copy(DEMO / side / "config.json", tmp_path)
    told, model = measure(str(tmp_path)), AutoModelForCausalLM.from_pretrained(DEMO / side)
    assert told.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert told.token_bytes == token_bytes(model, None)
    stored = (DEMO / side / "model.safetensors").stat().st_size
    assert told.weight_bytes <= stored < told.weight_bytes + 20_000


def test_tied_embeddings_are_counted_and_read_once(tmp_path):
    """A step reads an embedding that is the output layer too, and no other."""
    tied = measure(folder_of(tmp_path, **LLAMA_8B, tie_word_embeddings=True))
    apart = measure(folder_of(tmp_path, **LLAMA_8B))
    embedding = 128256 * 4096
    assert apart.parameters - tied.parameters == embedding
    assert tied.read_parameters == tied.parameters
    assert apart.read_parameters == apart.parameters - embedding


def test_a_published_model(tmp_path):
    """Llama 3 8B: 8.03 billion parameters, 128 KiB of keys and values per token in bfloat16."""
    size = measure(folder_of(tmp_path, **LLAMA_8B))
    assert (size.parameters, size.token_bytes, size.context_tokens) == (8_030_261_248, 131_072, 131_072)


def test_limits_by_hand():
    """A step reads weights and positions once and multiplies every row: whichever takes longer."""
    model = ModelSize("m", 1_000, 1_000, 2_000, 10, 8, None)
    machine = Machine("m", 1e6, bytes_per_s=1e6, flops_per_s=1e6)
    told = plan((model, model), Load(rows=2, prompt_tokens=100, new_tokens=50), machine)
    # One row: (4000 + 125 * 20) bytes against 4000 products. Two: (4000 + 150 * 20) bytes against 8000 products.
    assert told.one_row_tokens_per_s == pytest.approx(1 / 0.0065)
    assert told.tokens_per_s == pytest.approx(2 / 0.008)
    assert told.needed_bytes == 4_000 + 200 * 20 + 2 * 3 * 4 * 8


@given(
    rows=st.integers(1, 500),
    prompt=st.integers(1, 4000),
    new=st.integers(1, 4000),
    devices=st.integers(1, 8),
    machine=st.sampled_from(MACHINES),
    is_adapter=st.booleans(),
)
def test_max_rows_is_the_border(rows, prompt, new, devices, machine, is_adapter):
    """That many rows fit into the usable memory, one more does not; an adapter leaves more room."""
    pair = [ModelSize("m", 8_000_000_000, 7_500_000_000, 16_000_000_000, 131_072, 128_256, None)] * 2
    told = plan(pair, Load(rows, prompt, new), machine, devices, is_adapter=is_adapter)
    usable = machine.memory_bytes * USABLE_SHARE * devices
    if told.max_rows:
        fitting = plan(pair, Load(told.max_rows, prompt, new), machine, devices, is_adapter=is_adapter)
        assert fitting.needed_bytes <= usable * (1 + 1e-12)
    beyond = plan(pair, Load(told.max_rows + 1, prompt, new), machine, devices, is_adapter=is_adapter)
    assert beyond.needed_bytes > usable * (1 - 1e-12)
    assert told.fits == (told.max_rows >= rows)
    assert (
        is_adapter or plan(pair, Load(rows, prompt, new), machine, devices, is_adapter=True).max_rows >= told.max_rows
    )


def test_what_is_no_model_is_named(tmp_path):
    """A folder without a configuration, and one of another kind, are an error with a remedy."""
    for model_id in (str(tmp_path), folder_of(tmp_path, model_type="vit")):
        with pytest.raises(ModelNotFound, match=r"config\.json"):
            measure(model_id)


def test_the_command(tmp_path):
    """`lda-service doctor --plan` names both models and every machine, needs no weights, and says what is missing."""
    after, before = folder_of(tmp_path, **LLAMA_8B), save_model(tmp_path / "before", seed=1)
    models = ["--model-after-id", after, "--model-before-id", str(before)]
    told = CliRunner().invoke(main, ["doctor", "--plan", *models])
    assert told.exit_code == 0, told.output
    assert "8,030,261,248" in told.output
    assert all(machine.name in told.output for machine in MACHINES)
    own = ["--memory-gib", "24", "--bandwidth-gb-s", "300", "--tflops", "100"]
    told = CliRunner().invoke(main, ["doctor", "--plan", *models, *own, "--devices", "2"])
    assert "2 x yours" in told.output
    assert f"{2 * 24 * GIB / 2**30:.1f} GiB" in told.output
    for wrong in (models, ["--plan"], ["--plan", *models, "--tflops", "1"]):
        assert CliRunner().invoke(main, ["doctor", *wrong]).exit_code == 2
