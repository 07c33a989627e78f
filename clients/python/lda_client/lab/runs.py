"""A run folder: what a survey was, what it drew, and what judges said of it.

    RUN/manifest.json           settings, pair, versions, seeds, sessions
    RUN/prompts.jsonl           the prompts
    RUN/journal                 finished chunks, while the survey is under way
    RUN/rollouts.parquet        one row per rollout, by prompt, alpha and sequence
    RUN/verdicts-NAME.parquet   what the judge NAME said
    RUN/quality-NAME.json       how well it judges, see `agreement`

    run = Run.open("runs/first")
    frame = run.judged("ad")            # rollouts and `hit`, a polars frame
    log_q = run.log_q(frame)            # (rollouts, alphas): log-probability at each alpha of the survey

Nothing in `rollouts.parquet` tells when, where, or in how many sittings it was drawn: equal settings on a deterministic
server give equal bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from lda_client import StreamBroken
from lda_client.lab._errors import RunError
from lda_client.lab._files import replacing, write_text
from lda_client.lab._settings import SurveySettings
from lda_client.lab.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lda_client import Completion, Completions, pb
    from lda_client.lab._journal import Journal
    from lda_client.lab._settings import Chunk

FORMAT = 1
KEY = ("prompt_id", "alpha", "sequence")
ROWS_PER_GROUP = 16384

_DIAGNOSTICS: dict[str, pa.DataType] = {
    "after_logprob": pa.float32(),
    "before_logprob": pa.float32(),
    "amplified_logprob": pa.float32(),
    "after_rank": pa.uint32(),
    "before_rank": pa.uint32(),
    "after_before_kl": pa.float32(),
    "novel_mass": pa.float32(),
}


@dataclass(frozen=True)
class Manifest:
    """What a run is. Everything but `sessions` is fixed when it begins.

    Attributes:
        settings: of the survey.
        prompts_sha256: of `prompts.jsonl`.
        chat_template: whether string prompts were sent through the pair's chat template.
        pair: the pair as its server described it: fingerprint, both models with the checksums of their weights.
        created: when it was begun, UTC.
        sessions: one entry for each time the survey was started or resumed: when, client version, endpoints.
        format: of the folder.
    """

    settings: SurveySettings
    prompts_sha256: str
    chat_template: bool
    pair: dict[str, Any]
    created: str
    sessions: tuple[dict[str, Any], ...] = field(default=())
    format: int = FORMAT

    @property
    def score_alphas(self) -> tuple[float, ...]:
        """The alphas of the column `score_logprobs`, in its order."""
        return self.settings.score_alphas

    def with_session(self, session: dict[str, Any]) -> Manifest:
        """This manifest and one more session."""
        return replace(self, sessions=(*self.sessions, session))

    def to_text(self) -> str:
        """The text of `manifest.json`."""
        values = {**vars(self), "settings": self.settings.to_json(), "score_alphas": self.score_alphas}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The manifest in this text. Raises ValueError, KeyError or TypeError if there is none."""
        values = json.loads(text)
        values.pop("score_alphas", None)
        settings = SurveySettings.from_json(values.pop("settings"))
        return cls(**{**values, "settings": settings, "sessions": tuple(values["sessions"])})


@dataclass(frozen=True)
class Run:
    """A run folder that exists."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run folder. Raises RunError."""
        folder = Path(path)
        try:
            manifest = Manifest.from_text(manifest_path(folder).read_text("utf-8"))
        except FileNotFoundError:
            raise RunError(f"{folder}: is no run folder; `lda survey` makes one.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{manifest_path(folder)}: cannot be read ({error}).") from error
        if manifest.format != FORMAT:
            raise RunError(f"{folder}: has format {manifest.format}, and this version reads {FORMAT}.")
        return cls(folder, manifest)

    @property
    def settings(self) -> SurveySettings:
        """The settings of the survey."""
        return self.manifest.settings

    @property
    def rollouts_path(self) -> Path:
        """The file of the rollouts."""
        return self.path / "rollouts.parquet"

    @property
    def journal_path(self) -> Path:
        """The file of the finished chunks, while the survey is under way."""
        return self.path / "journal"

    @property
    def is_complete(self) -> bool:
        """Whether every rollout was drawn."""
        return self.rollouts_path.exists() and not self.journal_path.exists()

    @property
    def has_begun(self) -> bool:
        """Whether anything was drawn."""
        return self.rollouts_path.exists() or (self.journal_path.exists() and self.journal_path.stat().st_size > 0)

    def prompts(self) -> list[Prompt]:
        """The prompts, in order."""
        return read_prompts([prompts_path(self.path)])

    def rollouts(self, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """One row per rollout, by prompt, alpha and sequence. Raises RunError if there are none yet."""
        if not self.rollouts_path.exists():
            raise RunError(f"{self.path}: has no rollouts yet; go on with `lda survey --resume {self.path}`.")
        return pl.read_parquet(self.rollouts_path, columns=None if columns is None else list(columns))

    def log_q(self, frame: pl.DataFrame, alphas: Sequence[float] | None = None) -> NDArray[np.float64]:
        """Log-probability of each rollout of a frame at each of these alphas, by default those of the survey.

        Raises:
            RunError: for an alpha at which rollouts were not scored.
        """
        places = []
        for alpha in self.settings.alphas if alphas is None else alphas:
            if alpha not in self.manifest.score_alphas:
                raise RunError(f"{self.path}: its rollouts were not scored at alpha {alpha:g}.")
            places.append(self.manifest.score_alphas.index(alpha))
        return np.asarray(frame["score_logprobs"].to_numpy())[:, places]

    def judges(self) -> list[str]:
        """Names of the judges that have judged this run."""
        return sorted(path.stem.removeprefix("verdicts-") for path in self.path.glob("verdicts-*.parquet"))

    def verdicts_path(self, name: str) -> Path:
        """The file of a judge's verdicts."""
        return self.path / f"verdicts-{name}.parquet"

    def verdicts(self, name: str) -> pl.DataFrame:
        """What a judge said: prompt_id, alpha, sequence, hit, score. Raises RunError."""
        if not self.verdicts_path(name).exists():
            known = ", ".join(self.judges()) or "none so far"
            raise RunError(f"{self.path}: no judge {name!r} has judged this run (judges: {known}); see `lda judge`.")
        return pl.read_parquet(self.verdicts_path(name))

    def judged(self, name: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The rollouts with `hit` and `score` of a judge; `hit` is null where it came to no verdict.

        Raises:
            RunError: there are no verdicts, or not of every rollout.
        """
        rollouts, verdicts = self.rollouts(columns and [*KEY, *columns]), self.verdicts(name)
        joined = rollouts.join(verdicts, on=list(KEY), how="inner", maintain_order="left", validate="1:1")
        if not len(joined) == len(rollouts) == len(verdicts):
            raise RunError(f"{self.path}: the verdicts of {name!r} are not of these rollouts; run `lda judge` again.")
        return joined

    def judge_of(self, name: str) -> dict[str, Any]:
        """How a judge's verdicts were made."""
        self.verdicts(name)
        metadata = pq.read_schema(self.verdicts_path(name)).metadata or {}
        description: dict[str, Any] = json.loads(metadata[b"judge"])
        return description

    def write_verdicts(self, name: str, keys: pl.DataFrame, verdicts: pl.DataFrame, judge: dict[str, Any]) -> None:
        """Keep what a judge said, with how it judges."""
        table = pl.concat([keys.select(KEY), verdicts.select("hit", "score")], how="horizontal").to_arrow()
        table = table.replace_schema_metadata({b"judge": json.dumps(judge, sort_keys=True).encode()})
        with replacing(self.verdicts_path(name)) as scratch:
            pq.write_table(table, scratch, compression="zstd")

    def quality_path(self, name: str) -> Path:
        """The file that says how well a judge judges."""
        return self.path / f"quality-{name}.json"

    def save(self) -> None:
        """Write the manifest."""
        write_text(manifest_path(self.path), self.manifest.to_text())


def manifest_path(folder: Path) -> Path:
    """The manifest of a run folder."""
    return folder / "manifest.json"


def prompts_path(folder: Path) -> Path:
    """The prompts of a run folder."""
    return folder / "prompts.jsonl"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other surveys out of a run folder; the lock ends with this process. Raises RunError."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"{folder}: another survey is writing to it; wait for its end, or stop it.") from None
    finally:
        os.close(descriptor)


def pair_facts(pair: pb.GetModelPairResponse) -> dict[str, Any]:
    """What identifies a pair, as the manifest keeps it."""
    models = {"after": pair.after, "before": pair.before}
    names = ("model_id", "revision", "dtype", "architecture", "vocab_size", "parameter_count")
    facts: dict[str, Any] = {role: {name: getattr(model, name) for name in names} for role, model in models.items()}
    return {"fingerprint": pair.pair_fingerprint, **facts, "has_chat_template": pair.has_chat_template}


def rollout_schema(settings: SurveySettings) -> pa.Schema:
    """The columns of `rollouts.parquet`."""
    columns = [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("alpha", pa.float64(), nullable=False),
        pa.field("sequence", pa.uint32(), nullable=False),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.uint32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("output_tokens", pa.uint32(), nullable=False),
    ]
    if settings.score_alphas:
        columns.append(pa.field("score_logprobs", pa.list_(pa.float64(), len(settings.score_alphas)), nullable=False))
    if settings.diagnostics:
        columns.append(pa.field("token_piece", pa.list_(pa.binary())))
        columns += [pa.field(f"token_{name}", pa.list_(kind)) for name, kind in _DIAGNOSTICS.items()]
    return pa.schema(columns, metadata={"score_alphas": json.dumps(settings.score_alphas)})


def chunk_rows(settings: SurveySettings, chunk: Chunk, prompt_id: str, drawn: Completions) -> pa.RecordBatch:
    """The rows of a chunk that was drawn. Raises StreamBroken if it is not what was asked for."""
    schema = rollout_schema(settings)
    ordered = sorted(drawn, key=lambda completion: completion.sequence_index)
    if [completion.sequence_index for completion in ordered] != list(range(chunk.sequences)):
        raise StreamBroken(f"{len(ordered)} sequences came, and not those that were asked for.")
    values: dict[str, list[Any]] = {
        "prompt_id": [prompt_id] * chunk.sequences,
        "alpha": [chunk.alpha] * chunk.sequences,
        "sequence": list(range(chunk.first, chunk.first + chunk.sequences)),
        "seed": [chunk.seed] * chunk.sequences,
        "text": [completion.text for completion in ordered],
        "token_ids": [[token.id for token in completion.tokens] for completion in ordered],
        "finish_reason": [completion.reason_name for completion in ordered],
        "output_tokens": [completion.usage.output_token_count for completion in ordered],
    }
    if settings.score_alphas:
        values["score_logprobs"] = [_scores(completion, len(settings.score_alphas)) for completion in ordered]
    if settings.diagnostics:
        values |= _diagnostic_columns(ordered)
    return pa.RecordBatch.from_pydict(values, schema=schema)


def _scores(completion: Completion, count: int) -> list[float]:
    scores = list(completion.alpha_scores.values())
    if len(scores) != count:
        raise StreamBroken(f"A rollout came with {len(scores)} scores, and {count} were asked for.")
    return scores


def _diagnostic_columns(ordered: Sequence[Completion]) -> dict[str, list[Any]]:
    columns = {
        f"token_{name}": [[getattr(token.diagnostics, name) for token in completion.tokens] for completion in ordered]
        for name in _DIAGNOSTICS
    }
    return {"token_piece": [[token.piece for token in completion.tokens] for completion in ordered], **columns}


def pack(rows: pa.RecordBatch) -> bytes:
    """Rows as a record of the journal."""
    return bytes(rows.serialize())


def compact(run: Run, journal: Journal) -> None:
    """Write what the journal holds to `rollouts.parquet`, in canonical order and in one way."""
    schema = rollout_schema(run.settings)
    with replacing(run.rollouts_path) as scratch, _writer(scratch, schema) as writer:
        for group in _groups(journal, schema):
            writer.write_table(pa.Table.from_batches(group, schema).combine_chunks(), row_group_size=2 * ROWS_PER_GROUP)


def _groups(journal: Journal, schema: pa.Schema) -> Iterator[list[pa.RecordBatch]]:
    """The chunks in canonical order, cut into row groups where their own sizes say."""
    group: list[pa.RecordBatch] = []
    rows = 0
    for number in sorted(journal.numbers()):
        group.append(pa.ipc.read_record_batch(pa.py_buffer(journal.read(number)), schema))
        rows += group[-1].num_rows
        if rows >= ROWS_PER_GROUP:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=["prompt_id", "finish_reason"],
    )
