"""The way to vLLM that all machines of a group go alike: check settings, read the pair, make vLLM's arguments.

Imports vLLM only after its environment is set.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lda_service.errors import LdaError, ModelUnsupported
from lda_service.vllm_engine.settings import check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import EngineArgs

    from lda_service.config import Config
    from lda_service.vllm_engine.pair import PairFacts

logger = logging.getLogger(__name__)


def prepare(config: Config) -> tuple[EngineArgs, PairFacts]:
    """vLLM's arguments, and what is known of the pair.

    Raises:
        StartupError: the pair cannot be read, or a setting cannot be kept.
    """
    check(config)
    from lda_service.vllm_engine.pair import read_pair
    from lda_service.vllm_engine.settings import engine_args

    facts = read_pair(config.pair, config.vllm.arguments.get("max_model_len"))
    return engine_args(config, facts), facts


@contextmanager
def explained() -> Iterator[None]:
    """What vLLM says of a pair or a setting that it cannot run becomes an error of this service's.

    Raises:
        ModelUnsupported: vLLM refused.
    """
    try:
        yield
    except (LdaError, OSError):
        raise
    except Exception as error:  # what it raises is its own to choose
        logger.exception("vLLM could not start")
        raise ModelUnsupported(f"vLLM cannot run this pair with these settings: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What vLLM has to say, without the page that pydantic writes around it."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error)
