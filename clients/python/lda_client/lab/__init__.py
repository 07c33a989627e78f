"""The rare-behaviour lab: from "it can happen" to "how often, and is it real". Needs the extra `lab`.

    from lda_client.lab import Run, SurveySettings, read_prompts, run_survey

    run_survey("runs/first", read_prompts(["prompts.txt"]), SurveySettings(alphas=(0, 0.5, 1), rollouts=500))
    frame = Run.open("runs/first").rollouts()           # a polars frame

On the command line: `lda survey`, `lda judge`, `lda agree`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lda_client.lab._errors import (
    JudgeError,
    LabError,
    PairsDiffer,
    PromptError,
    RunError,
    SettingsDiffer,
    SettingsError,
    SurveyFailed,
)

if TYPE_CHECKING:
    from lda_client.lab._settings import SurveySettings
    from lda_client.lab.prompts import Prompt, read_prompts
    from lda_client.lab.runs import Manifest, Run
    from lda_client.lab.survey import Outcome, Pace, resume_survey, run_survey, run_survey_async

# Imported when they are first asked for: the command line must not wait for polars to print its help.
_HOMES = {
    "Manifest": "runs",
    "Outcome": "survey",
    "Pace": "survey",
    "Prompt": "prompts",
    "Run": "runs",
    "SurveySettings": "_settings",
    "read_prompts": "prompts",
    "resume_survey": "survey",
    "run_survey": "survey",
    "run_survey_async": "survey",
}

__all__ = [
    "JudgeError",
    "LabError",
    "Manifest",
    "Outcome",
    "Pace",
    "PairsDiffer",
    "Prompt",
    "PromptError",
    "Run",
    "RunError",
    "SettingsDiffer",
    "SettingsError",
    "SurveyFailed",
    "SurveySettings",
    "read_prompts",
    "resume_survey",
    "run_survey",
    "run_survey_async",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
