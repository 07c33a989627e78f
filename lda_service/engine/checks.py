"""What every engine refuses, with its reason and remedy. Knows requests and limits; no torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lda_service.engine.request import GenerationRequest, RequestFailed
from lda_service.errors import ContextExceeded, InternalError, PromptUnusable, QueueFull

if TYPE_CHECKING:
    from lda_service.engine.request import ScoreRequest

logger = logging.getLogger(__name__)


def check_queue(waiting: int, capacity: int) -> None:
    """Raise `QueueFull` if as many requests wait as may wait."""
    if waiting >= capacity:
        raise QueueFull(
            f"{capacity} requests wait already; try again later or on another server.",
            metadata={"depth": str(waiting), "capacity": str(capacity)},
            retry_after_s=1.0,
        )


def check_request(request: GenerationRequest | ScoreRequest, shared: frozenset[int], context_tokens: int) -> None:
    """Check ids and length.

    Raises:
        PromptUnusable: the prompt or the continuation is empty, or holds ids that the models do not share.
        ContextExceeded: it does not fit the context window.
    """
    _check_ids(request.prompt_ids, shared, "prompt")
    if isinstance(request, GenerationRequest):
        _check_prompt(request, context_tokens)
    else:
        _check_ids(request.continuation_ids, shared, "continuation")
        _check_text(request, context_tokens)


def not_finite(request_id: str) -> RequestFailed:
    """The end of a request whose models gave NaN or infinity: a float16 overflow, or broken weights."""
    logger.error("%s: logits are not finite; broken weights, or a DTYPE too narrow for the models", request_id)
    return RequestFailed(request_id, InternalError("The models gave logits that are not finite."))


def context_metadata(request: GenerationRequest | ScoreRequest, limit: int) -> dict[str, str]:
    """The facts behind a `ContextExceeded`."""
    new = request.stopping.max_new_tokens if isinstance(request, GenerationRequest) else len(request.continuation_ids)
    return {"prompt_tokens": str(len(request.prompt_ids)), "max_new_tokens": str(new), "limit": str(limit)}


def _check_prompt(request: GenerationRequest, limit: int) -> None:
    if len(request.prompt_ids) >= limit:
        raise ContextExceeded(
            f"The prompt has {len(request.prompt_ids)} tokens and the context window {limit}; shorten the prompt.",
            field="prompt",
            metadata=context_metadata(request, limit),
        )


def _check_text(request: ScoreRequest, limit: int) -> None:
    total = len(request.prompt_ids) + len(request.continuation_ids)
    if total > limit:
        raise ContextExceeded(
            f"Prompt and continuation have {total} tokens and the context window {limit}; score a shorter text.",
            field="continuation",
            metadata=context_metadata(request, limit),
        )


def _check_ids(ids: tuple[int, ...], shared: frozenset[int], field_name: str) -> None:
    if not ids:
        raise PromptUnusable(f"The {field_name} has no tokens; give at least one.", field=field_name)
    unknown = next((token for token in ids if token not in shared), None)
    if unknown is not None:
        raise PromptUnusable(
            f"The {field_name} holds token {unknown}, which the two models do not share; TokenizerCompat lists "
            "what differs. Use other text, or send raw text if the chat template adds the token.",
            field=field_name,
            metadata={"token_id": str(unknown)},
        )
