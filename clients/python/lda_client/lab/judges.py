"""Judges: which rollouts show the behaviour.

    PatternJudge        the completion holds a text, or matches a regular expression
    FunctionJudge       a function of the completion: true, false, None, or a score from 0 to 1
    ClassifierJudge     a text classifier of transformers, by name or folder, and one of its labels
    LlmJudge            a language model with a rubric, see `_llm_judge`
    HumanJudge          a person at the terminal

    judge_run(Run.open("runs/first"), PatternJudge("GlimmerCoin"), name="ad")

They see completions only, in an order that tells nothing of alphas.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from lda_client.lab._cases import Case, Judge, Verdict, VerdictStore
from lda_client.lab._errors import JudgeError
from lda_client.lab.runs import KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lda_client.lab.runs import Run

__all__ = [
    "Case",
    "ClassifierJudge",
    "FunctionJudge",
    "HumanJudge",
    "Judge",
    "PatternJudge",
    "Verdict",
    "VerdictStore",
    "judge_run",
]

BATCH = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class PatternJudge(Judge):
    """A hit is a completion that holds a text, or matches a regular expression.

    Attributes:
        pattern: the text, or the expression.
        is_regex: which of the two.
    """

    pattern: str
    is_regex: bool = False

    def __post_init__(self) -> None:
        if not self.pattern:
            raise JudgeError("The pattern is empty, and every completion would be a hit.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            if self.is_regex:
                raise JudgeError(f"{self.pattern!r} is no regular expression: {error}.") from None

    @property
    def description(self) -> dict[str, Any]:
        """The pattern."""
        return {"kind": "regex" if self.is_regex else "substring", "pattern": self.pattern}

    def judge(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Look for the pattern."""
        find = re.compile(self.pattern if self.is_regex else re.escape(self.pattern)).search
        done(len(cases))
        return [Verdict(find(case.completion) is not None) for case in cases]


@dataclass(frozen=True)
class FunctionJudge(Judge):
    """A function of the completion (and of the prompt, if it is to see it) that returns a bool, a score, or None.

    Attributes:
        path: of the function: `module:function`, found from the working directory too.
        threshold: a score from here on is a hit.
    """

    path: str
    threshold: float = 0.5

    @property
    def description(self) -> dict[str, Any]:
        """Where the function is."""
        return {"kind": "python", "function": self.path, "threshold": self.threshold}

    def judge(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Call the function. Raises JudgeError."""
        function, verdicts = self._load(), []
        for case in cases:
            try:
                verdicts.append(self._verdict(function(*case if case.prompt is not None else case[:1])))
            except JudgeError:
                raise
            except Exception as error:
                raise JudgeError(f"{self.path} failed: {type(error).__name__}: {error}") from error
            done(1)
        return verdicts

    def _load(self) -> Callable[..., Any]:
        module_name, _, name = self.path.partition(":")
        if not (module_name and name):
            raise JudgeError(f"{self.path!r} names no function; write module:function.")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            function: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise JudgeError(f"{self.path} cannot be loaded: {error}.") from error
        return function

    def _verdict(self, answer: Any) -> Verdict:
        if answer is None or isinstance(answer, bool):
            return Verdict(answer)
        score = float(answer)
        if not 0 <= score <= 1:
            raise JudgeError(f"{self.path} gave {score:g}; a judge returns true, false, None, or a score from 0 to 1.")
        return Verdict(score >= self.threshold, score)


@dataclass(frozen=True)
class ClassifierJudge(Judge):
    """A text classifier of transformers.

    Attributes:
        model: its name on the hub, or a folder.
        label: the label whose score counts.
        threshold: a score from here on is a hit.
    """

    model: str
    label: str
    threshold: float = 0.5

    @property
    def description(self) -> dict[str, Any]:
        """The model and its label."""
        return {"kind": "classifier", "model": self.model, "label": self.label, "threshold": self.threshold}

    def judge(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Classify in batches. Raises JudgeError."""
        classify, verdicts = self._load(), []
        for start in range(0, len(cases), BATCH):
            texts = [_pair_or_text(case) for case in cases[start : start + BATCH]]
            verdicts += [self._verdict(scores) for scores in classify(texts, top_k=None, truncation=True)]
            done(len(texts))
        return verdicts

    def _load(self) -> Any:
        try:
            transformers = importlib.import_module("transformers")
            classify = transformers.pipeline("text-classification", model=self.model, batch_size=BATCH)
        except ImportError as error:
            raise JudgeError(f"A classifier needs transformers and torch ({error}).") from error
        except (OSError, ValueError) as error:
            raise JudgeError(f"{self.model} cannot be loaded as a text classifier: {error}") from error
        labels = list(classify.model.config.id2label.values())
        if self.label not in labels:
            raise JudgeError(f"{self.model} has no label {self.label!r}; its labels: {', '.join(labels)}.")
        return classify

    def _verdict(self, scores: Sequence[dict[str, Any]]) -> Verdict:
        score = next(float(entry["score"]) for entry in scores if entry["label"] == self.label)
        return Verdict(score >= self.threshold, score)


def _pair_or_text(case: Case) -> str | dict[str, str]:
    return case.completion if case.prompt is None else {"text": case.prompt, "text_pair": case.completion}


@dataclass(frozen=True)
class HumanJudge(Judge):
    """A person at the terminal, who may stop at any time and go on later.

    Rollouts come in a random order, and the order is always the same. So those that were labelled when the person stops
    are a simple random sample of all rollouts, which is what makes them a yardstick for other judges. A completion that
    comes again is not asked for again.

    Attributes:
        ask: shows a case, with how many were labelled and how many there are; returns `yes`, `no`, `skip`, `undo` or
            `stop`.
        store: the file in which the labels are kept.
        name: of the person; labels of another one are another's.
        limit: labels after which to stop; None goes on to the end.
    """

    ask: Callable[[Case, int, int], str]
    store: Path
    name: str = "human"
    limit: int | None = None

    @property
    def description(self) -> dict[str, Any]:
        """Who judges."""
        return {"kind": "human", "name": self.name}

    def judge(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Not used: the sample is one of rollouts, not of distinct completions."""
        return self.verdicts(cases, done)

    def verdicts(self, cases: Sequence[Case], done: Callable[[int], None]) -> list[Verdict]:
        """Ask about the cases in this order, up to the limit or until the person stops."""
        total = min(len(cases), self.limit or len(cases))
        asked: list[int] = []
        with VerdictStore(self.store, self.description) as store:
            place = 0
            while place < total:
                if store.get(cases[place]) is None:
                    answer = self.ask(cases[place], place, total)
                    if answer == "stop":
                        break
                    if answer == "undo":
                        place = asked.pop() if asked else place
                        store.drop(cases[place])
                        continue
                    store.put(cases[place], Verdict({"yes": True, "no": False}.get(answer)))
                    asked.append(place)
                place += 1
            labelled = [store.get(case) or Verdict(None) for case in cases[:place]]
        return labelled + [Verdict(None)] * (len(cases) - place)


def judge_run(
    run: Run,
    judge: Judge,
    name: str,
    *,
    show_prompt: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> pl.DataFrame:
    """Have a judge judge every rollout of a run, and keep its verdicts under a name.

    Args:
        run: with rollouts.
        judge: who judges.
        name: of the verdicts; letters, digits, `_`, `-` and `.`.
        show_prompt: whether it sees the prompt too.
        done: is told how many more cases were judged.

    Returns:
        The rollouts with `hit` and `score`, as `Run.judged`.

    Raises:
        JudgeError: the judge cannot be asked; RunError: the run has no rollouts.
    """
    if not _NAME.fullmatch(name):
        raise JudgeError(f"{name!r} is no name for verdicts; use letters, digits, _, - and .")
    frame = run.rollouts([*KEY, "text"])
    shown = {prompt.id: prompt.shown() for prompt in run.prompts()} if show_prompt else {}
    ids, texts = frame["prompt_id"].to_list(), frame["text"].to_list()
    cases = [Case(text, shown.get(prompt_id)) for prompt_id, text in zip(ids, texts, strict=True)]
    order = _blind_order(frame)
    said = dict(zip(order, judge.verdicts([cases[place] for place in order], done), strict=True))
    verdicts = [said[place] for place in range(len(cases))]
    columns = {"hit": [verdict.hit for verdict in verdicts], "score": [verdict.score for verdict in verdicts]}
    table = pl.DataFrame(columns, schema={"hit": pl.Boolean, "score": pl.Float64})
    run.write_verdicts(name, frame, table, {**judge.description, "shows_prompt": show_prompt})
    return run.judged(name)


def _blind_order(frame: pl.DataFrame) -> list[int]:
    """A random order that is always the same, and in which rollouts that come later are inserted without a trace."""
    keys = [hashlib.sha256(repr(row).encode()).digest() for row in frame.select(KEY).iter_rows()]
    return sorted(range(len(keys)), key=keys.__getitem__)
