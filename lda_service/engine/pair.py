"""Load the two models of a pair, and say what was loaded.

Knows hub ids, folders, dtypes and devices; nothing of requests. Every fault a person can cause becomes a `StartupError`
that names the remedy.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lda_service import vocabulary
from lda_service.engine import adapter
from lda_service.engine.detokenizer import TokenPieces
from lda_service.engine.fallback import Decoding
from lda_service.engine.fused_layers import fuse_layers
from lda_service.engine.lora import ALL, wrap
from lda_service.engine.prepack import Backend, choose_backend, swap_bodies, swap_heads
from lda_service.engine.quantize import CALIBRATION_TEXT, CALIBRATION_TOKENS, quantize
from lda_service.engine.selfcheck import choose_decoding, ends_in_its_head, plain_logits, whole_logits
from lda_service.engine.sharing import share_equal_tensors, stored_bytes
from lda_service.errors import ConfigError, ModelNotFound, ModelUnreadable, ModelUnsupported
from lda_service.pair_info import ModelInfo, PairInfo
from lda_service.pairs import demo
from lda_service.prompting import PromptRenderer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lda_service.config import PairConfig
    from lda_service.engine.lora import AdaptedRows
    from lda_service.engine.quantize import QuantizationError

logger = logging.getLogger(__name__)
DEFAULT_CONTEXT = 4096
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One model with its tokenizer and what is known about both."""

    model: PreTrainedModel
    tokenizer: Any
    info: ModelInfo
    eos_ids: tuple[int, ...]
    plain_logits: Tensor


@dataclass(frozen=True, slots=True)
class Pair:
    """Two loaded models, the ids both may generate, and the ids that end a sequence in either.

    If `adapted_rows` is set, `after` is `before`: one model with an adapter that acts on the rows it is told to. If
    `head` is set, it is the output layer of both, and logits are its product with hidden states and nothing else.
    """

    after: PreTrainedModel
    before: PreTrainedModel
    tokenizer: Any
    pieces: TokenPieces
    shared_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    info: PairInfo
    backend: Backend
    decoding: tuple[Decoding, Decoding] = (Decoding.NATIVE, Decoding.NATIVE)  # after, before
    adapted_rows: AdaptedRows | None = None
    head: Any = None
    quantization_error: QuantizationError | None = None

    @property
    def vocabulary_size(self) -> int:
        """Width of the combined logits: one past the largest shared id."""
        return self.shared_ids[-1] + 1

    @property
    def has_two_caches(self) -> bool:
        """Whether both models run through this engine's cache, each in passes of its own."""
        return self.adapted_rows is None and set(self.decoding) == {Decoding.NATIVE}


def load_pair(config: PairConfig) -> Pair:
    """Load both models and compare their vocabularies.

    Raises:
        StartupError: a model is missing, unreadable or unsupported, or the pair cannot be amplified.
    """
    device = choose_device(config.device)
    before = load_model(config.model_before_id, config.dtype, device)
    adapter_config = adapter.find_config(config.model_after_id)
    adapted_rows = None
    if adapter_config is not None:
        after, adapted_rows = _load_adapted(adapter.read_adapter(config.model_after_id, adapter_config), config, before)
    else:
        after = load_model(config.model_after_id, config.dtype, device)
    sides = [vocabulary.Side(m.tokenizer, m.info.vocab_size, m.eos_ids) for m in (after, before)]
    report, shared = vocabulary.admit(*sides, allow_incompatible=config.allow_incompatible)
    models = (after.model, before.model)
    if adapted_rows is None:
        logger.info("shared_weight_bytes=%d", share_equal_tensors(*models))
    one_head = _have_one_head(*models)
    backend = choose_backend(models, use_native=config.native)
    swap_heads(backend, models)
    rounding = None
    if config.quantize == "int8":
        rounding = _quantize(after, before, shared, adapted_rows)
        after, before = (_with_plain_logits(*side, adapted_rows) for side in ((after, ALL), (before, 0)))
        share_equal_tensors(*models)
    swap_bodies(backend, models)
    _fuse(backend, after, before)
    logger.info("decoding with %s", backend.summary)
    info = make_info(after.info, before.info, after.tokenizer, report, str(device))
    pieces = TokenPieces.from_tokenizer(after.tokenizer)
    stop_ids = frozenset(after.eos_ids + before.eos_ids) & frozenset(shared)
    decoding = (_decoding(after, backend, adapted_rows, ALL), _decoding(before, backend, adapted_rows, 0))
    head = output_layer(after.model) if one_head and set(decoding) == {Decoding.NATIVE} else None
    return Pair(
        after=after.model,
        before=before.model,
        tokenizer=after.tokenizer,
        pieces=pieces,
        shared_ids=shared,
        stop_ids=stop_ids,
        info=info,
        backend=backend,
        decoding=decoding,
        adapted_rows=adapted_rows,
        head=head,
        quantization_error=rounding,
    )


def make_info(
    after: ModelInfo, before: ModelInfo, tokenizer: Any, report: vocabulary.CompatibilityReport, device: str
) -> PairInfo:
    """What is told about a pair."""
    return PairInfo(
        after=after,
        before=before,
        device=device,
        fingerprint=_digest(f"{after.revision}:{before.revision}:{after.dtype}".encode()),
        has_chat_template=PromptRenderer(tokenizer).has_chat_template,
        compatibility=report,
    )


def choose_device(name: str) -> torch.device:
    """The device to run on; "auto" is CUDA where there is one.

    Raises:
        ConfigError: the name is unknown to torch, or CUDA was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"DEVICE is {name!r}; use cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("DEVICE asks for CUDA, but torch finds no CUDA device; use DEVICE=cpu.")
    return device


def load_model(model_id: str, dtype: str, device: torch.device) -> LoadedModel:
    """One model and its tokenizer, from a local folder or the hub, ready to be decoded.

    Raises:
        StartupError: see `load_pair`.
    """
    try:
        config = AutoConfig.from_pretrained(model_id, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            model_id,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except Exception as error:  # what a broken file makes the readers raise is theirs to choose
        raise explain(model_id, error) from error
    model = model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    info = describe(model_id, model, config)
    plain = _plain_logits(model_id, model, info.vocab_size)
    return LoadedModel(model, tokenizer, info, eos_ids(model, tokenizer), plain)


def _load_adapted(lora: adapter.Adapter, config: PairConfig, base: LoadedModel) -> tuple[LoadedModel, AdaptedRows]:
    """Put the adapter beside the base model's weights; the result shares the base's model object."""
    adapter.require_base(lora, config.model_before_id)
    shared_bytes = stored_bytes(base.model)
    head = next(path for path, module in base.model.named_modules() if module is output_layer(base.model))
    try:
        if head in lora.weights:
            raise LookupError("it changes the output layer, which both models share")
        rows = wrap(base.model, lora.weights)
    except LookupError as error:
        raise ModelUnsupported(
            f"Adapter {lora.model_id!r} cannot be applied beside {lora.base_id!r}: {error}. Merge it first (PEFT's "
            "merge_and_unload) and give the folder of the merged model as MODEL_AFTER_ID."
        ) from error
    tokenizer = base.tokenizer
    if adapter.brings_tokenizer(lora.model_id):
        tokenizer = AutoTokenizer.from_pretrained(lora.model_id, trust_remote_code=False)
    logger.info("shared_weight_bytes=%d", shared_bytes)
    info = replace(
        base.info,
        model_id=public_name(lora.model_id),
        revision=lora.revision,
        parameter_count=base.model.num_parameters(),
    )
    plain = _plain_logits(lora.model_id, base.model, base.info.vocab_size)
    return LoadedModel(base.model, tokenizer, info, eos_ids(base.model, tokenizer), plain), rows


def explain(model_id: str, error: Exception) -> ModelNotFound | ModelUnreadable | ModelUnsupported:
    """Turn what transformers raised into the error a person can act on."""
    folder = Path(model_id)
    if isinstance(error, PermissionError):
        return ModelUnreadable(f"Model {model_id!r} cannot be read: permission denied. Check its file modes.")
    if isinstance(error, (ValueError, KeyError)) and "architecture" in str(error).lower():
        return ModelUnsupported(f"Model {model_id!r} has an architecture that transformers does not know.")
    if adapter.find_config(model_id) is not None:
        return ModelUnsupported(
            f"Model {model_id!r} is an adapter; only MODEL_AFTER_ID may be one. Merge it first (PEFT's "
            "merge_and_unload) and give the folder of the merged model."
        )
    if folder.is_dir():
        found = {path.name for path in folder.iterdir()}
        if "config.json" not in found:
            return ModelNotFound(f"Folder {model_id!r} holds no config.json; give the folder of a saved model.")
        if not any(name.endswith(".safetensors") for name in found):
            return ModelUnreadable(f"Folder {model_id!r} holds no .safetensors file; convert the weights first.")
        return ModelUnreadable(f"Model {model_id!r} cannot be read: {error}")
    if folder.is_absolute() or model_id.startswith("."):
        return ModelNotFound(f"Folder {model_id!r} does not exist: name a local folder or a hub repository.")
    return ModelNotFound(
        f"Model {model_id!r} is neither a local folder nor a hub repository that can be reached; "
        "check the name, the network and, for a gated model, HF_TOKEN."
    )


def _plain_logits(model_id: str, model: PreTrainedModel, vocabulary: int) -> Tensor:
    try:
        return plain_logits(model, vocabulary)
    except Exception as error:
        logger.exception("a plain pass of %s failed", model_id)
        raise ModelUnsupported(
            f"Model {model_id!r} ({type(model).__name__}) cannot be run on plain text ids: {error}"
        ) from error


def _with_plain_logits(loaded: LoadedModel, count: int, adapted_rows: AdaptedRows | None) -> LoadedModel:
    """What the model says now that its weights were changed."""
    _adapt(adapted_rows, count)
    return replace(loaded, plain_logits=_plain_logits(loaded.info.model_id, loaded.model, loaded.info.vocab_size))


def _adapt(adapted_rows: AdaptedRows | None, count: int) -> None:
    """Let an adapter, if there is one, act on that many rows of the next pass."""
    if adapted_rows is not None:
        adapted_rows.count = count


def _decoding(loaded: LoadedModel, backend: Backend, adapted_rows: AdaptedRows | None, count: int) -> Decoding:
    """How the model is decoded, said aloud if it is slow. `count` of the rows are adapted while it is tried.

    Raises:
        ModelUnsupported: no way of decoding it agrees with one plain pass.
    """
    _adapt(adapted_rows, count)
    model_id = loaded.info.model_id
    decoding = choose_decoding(loaded.model, backend, loaded.plain_logits)
    if decoding is None:
        raise ModelUnsupported(
            f"Model {model_id!r} ({loaded.info.architecture}) gives other logits when it is decoded step by step than "
            "in one plain pass; use another architecture, or merge an adapter first (PEFT's merge_and_unload)."
        )
    if decoding is not Decoding.NATIVE:
        logger.warning("%s is decoded slowly: %s", model_id, decoding.value)
    return decoding


def _fuse(backend: Backend, *sides: LoadedModel) -> None:
    if backend.kernels is None or not backend.invariant:
        return
    for side in {id(side.model): side for side in sides}.values():
        count = fuse_layers(side.model, backend.kernels, backend.cache_dtype, side.info.context_tokens)
        logger.info("fused_layers=%d model=%s", count, side.info.model_id)


def output_layer(model: PreTrainedModel) -> Any:
    """The module that turns hidden states into logits; None if the model does not say."""
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


def _quantize(
    after: LoadedModel, before: LoadedModel, shared: tuple[int, ...], adapted_rows: AdaptedRows | None
) -> QuantizationError:
    """Quantise both models, and say what that does to the combined logits on a short text."""
    known = set(shared)
    ids = [i for i in after.tokenizer(CALIBRATION_TEXT, add_special_tokens=False)["input_ids"] if i in known]
    ids = ids[: min(CALIBRATION_TOKENS, after.info.context_tokens, before.info.context_tokens)] or list(shared[:2])

    def logits(side: LoadedModel, count: int) -> Tensor:
        _adapt(adapted_rows, count)
        return whole_logits(side.model, ids)[:, list(shared)]

    sides = (after, before)
    runs = (partial(logits, after, ALL), partial(logits, before, 0))
    error = quantize(runs, [side.model for side in sides], [output_layer(side.model) for side in sides])
    logger.info("int8 weights: RMS error %.3g nats at alpha 1, %.3g at alpha 10", error.rms(1), error.rms(10))
    return error


def _have_one_head(*models: PreTrainedModel) -> bool:
    """Whether both models have the same output layer, and it is the last thing that happens to their logits."""
    one, other = (output_layer(model) for model in models)
    if one is None or other is None:
        return False
    equal = one.weight is other.weight and getattr(one, "bias", None) is getattr(other, "bias", None)
    if not equal or not all(ends_in_its_head(model) for model in models):
        return False
    logger.info("the models have one output layer: one product for both")
    return True


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a sequence: those of the generation configuration and the tokenizer's own."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None}))


def describe(model_id: str, model: PreTrainedModel, config: Any) -> ModelInfo:
    """What is told about a model. A local path is cut to its last name: callers need not know the server's disk."""
    text_config = config.get_text_config()
    return ModelInfo(
        model_id=public_name(model_id),
        revision=revision(model_id, config),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=text_config.vocab_size if output_layer(model) is None else output_layer(model).weight.shape[0],
        architecture=type(model).__name__,
        parameter_count=model.num_parameters(),
        context_tokens=context_tokens(text_config),
    )


def public_name(model_id: str) -> str:
    """The name shown to clients."""
    path = Path(model_id)
    if path in (demo.AFTER_DIR, demo.BEFORE_DIR):
        return f"bundled/{path.name}"
    return path.resolve().name if path.is_dir() else model_id


def context_tokens(config: Any) -> int:
    """Positions the model reaches.

    Rope variants that change all positions once a batch grows past the original length would make rows depend on their
    neighbours: such models end at their original length.
    """
    reach = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        original = getattr(config, "original_max_position_embeddings", None)
        reach = min(reach, rope.get("original_max_position_embeddings") or original or reach)
    return int(reach)


def revision(model_id: str, config: Any) -> str:
    """The hub's commit, or a digest of the weight files."""
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(model_id).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
