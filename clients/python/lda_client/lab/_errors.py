"""What a user of the lab can get wrong, as errors of one tree. Each message says what is wrong and what to do.

LabError
├── PromptError        a prompt file cannot be read as prompts; names file and line
├── SettingsError      settings that cannot be used, or that would break an estimator
│   └── SettingsDiffer     a run folder was begun with other settings
├── RunError           a run folder is missing, unfinished, in use, or damaged
├── PairsDiffer        the servers hold different pairs, or another one than the run was begun with
├── SurveyFailed       the servers did not come back, or one chunk failed again and again
└── JudgeError         a judge cannot be made, or cannot be asked
"""

from __future__ import annotations


class LabError(Exception):
    """Base of all errors of the lab."""


class PromptError(LabError):
    """A prompt file cannot be read as prompts."""


class SettingsError(LabError):
    """Settings that cannot be used, or that would break an estimator."""


class SettingsDiffer(SettingsError):
    """A run folder was begun with other settings."""


class RunError(LabError):
    """A run folder is missing, unfinished, in use, or damaged."""


class PairsDiffer(LabError):
    """The servers hold different pairs, or another one than the run was begun with."""


class SurveyFailed(LabError):
    """The servers did not come back, or one chunk failed again and again."""


class JudgeError(LabError):
    """A judge cannot be made, or cannot be asked."""
