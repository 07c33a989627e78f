"""`lda`: a model provider of Inspect (https://inspect.aisi.org.uk), so that its evaluations run on the amplified model.

    inspect eval task.py --model lda/127.0.0.1:50051 -M alpha=1 --temperature 1

The model's name is the address of the server; `LdaAPI` lists the model arguments. Inspect finds the provider by the
entry point of `lda-client[inspect]`. Knows the asyncio client and Inspect; nothing of channels and of how requests are
built.
"""

# mypy: disable-error-code="import-not-found", disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
import math
import os
import random
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from google.protobuf.json_format import MessageToDict
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    ChatMessageTool,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelCall,
    ModelOutput,
    ModelUsage,
    RetryDecision,
    TopLogprob,
    modelapi,
)
from tenacity.wait import wait_base, wait_exponential_jitter

from lda_client._channel import Timeout, Tls
from lda_client._client_async import AsyncLdaClient
from lda_client._errors import (
    CallerLimit,
    DeadlineTooShort,
    OutOfMemory,
    QueueFull,
    ServerAway,
    SlowConsumer,
    Unauthenticated,
    Unavailable,
)
from lda_client._requests import GenerateOptions, build_prompt, generate_request
from lda_client.gen.lda.v1 import lda_service_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from inspect_ai.model import ChatMessage, StopReason
    from inspect_ai.tool import ToolChoice, ToolInfo
    from tenacity import RetryCallState

    from lda_client._gather import Completion, Completions

TOKEN_VARIABLE = "LDA_TOKEN"

_STOP_REASONS: dict[int, StopReason] = {
    pb.FINISH_REASON_EOS: "stop",
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_MAX_TOKENS: "max_tokens",
    pb.FINISH_REASON_TIME_BUDGET: "max_tokens",
    pb.FINISH_REASON_CONTEXT_WINDOW: "model_length",
}

# They change what is drawn or what comes back, so an evaluation that sets them must not run as if it had not.
_UNSUPPORTED_SETTINGS = (
    "best_of",
    "extra_body",
    "fallback_models",
    "frequency_penalty",
    "logit_bias",
    "modalities",
    "presence_penalty",
    "prompt_logprobs",
    "response_schema",
)


class Unsupported(ValueError):
    """An evaluation asks for what an amplified model cannot do; the message says what to change."""


@modelapi(name="lda")
def lda() -> type[ModelAPI]:
    """The provider under its name."""
    return LdaAPI


class LdaAPI(ModelAPI):
    """One server of an amplified pair, as a model of Inspect.

    Args:
        model_name: address of the server, `host:port` or any gRPC target; any name you like if `base_url` is given.
        base_url: address of the server, where the model shall have a name of its own in the logs.
        api_key: bearer token; the variable LDA_TOKEN holds it otherwise.
        config: settings of Inspect that hold for every call.
        alpha: amplification; 0 is the post-trained model itself. The server's default unless given.
        plausibility: keep tokens with p_after >= plausibility * max p_after.
        top_candidates: alternatives per position, up to 50, for evaluations that do not ask for `top_logprobs`.
        diagnostics: compare the two models at every token; `mean_kl` is then in the metadata of the output.
        raw: send the one user message as it is, without the chat template.
        timeout: deadline of one call in seconds.
        tls: speak TLS, trusting the authorities of this machine.
        tls_ca: speak TLS, trusting the authorities in this PEM file; LDA_TLS_CA unless given.
        tls_cert: certificate (PEM) to show to the server; LDA_TLS_CERT unless given.
        tls_key: its private key (PEM); LDA_TLS_KEY unless given.
        tls_server_name: the name in the server's certificate, where it is not that of the address.
        token: refused, because Inspect writes model arguments into its logs.

    Raises:
        TypeError, ValueError: for an argument that fits no request.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - the signature that Inspect documents
        *,
        alpha: float | None = None,
        plausibility: float | None = None,
        top_candidates: int | None = None,
        diagnostics: bool = False,
        raw: bool = False,
        timeout: float | None = None,
        tls: bool = False,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_server_name: str | None = None,
        token: None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [TOKEN_VARIABLE], config)
        if token is not None:
            raise ValueError(
                "token: Inspect writes model arguments into its logs, where a token must not be; "
                f"set the variable {TOKEN_VARIABLE}, or give it as api_key."
            )
        self._target = base_url or model_name
        self._credentials = _credentials(tls, tls_ca, tls_cert, tls_key, tls_server_name)
        self._timeout = Timeout(total_s=timeout)
        self._raw = raw
        self._options: GenerateOptions = {
            "alpha": alpha,
            "plausibility": plausibility,
            "top_candidates": top_candidates,
            "diagnostics": diagnostics,
        }
        generate_request(pb.Prompt(), **self._options)  # of the wrong type: now, not at the first sample
        self._client: AsyncLdaClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_answered = False

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> tuple[ModelOutput, ModelCall]:
        """Draw `num_choices` completions. Cancelling the task cancels the call on the server.

        Raises:
            Unsupported: for tools, media and settings that the pair cannot follow.
            LdaClientError: if the call fails.
        """
        _refuse_tools(tools)
        _refuse_settings(config)
        options = self._options | _config_options(config, self._options)
        stream = self._connected().generate(_prompt(input, raw=self._raw), **options)
        completions = await stream.gather()
        self._has_answered = True
        with_logprobs = bool(config.logprobs or options.get("top_candidates"))
        request = MessageToDict(stream.request, preserving_proto_field_name=True)
        response = MessageToDict(completions.started, preserving_proto_field_name=True)
        return self._output(completions, with_logprobs), ModelCall.create(request, response)

    def _output(self, completions: Completions, with_logprobs: bool) -> ModelOutput:
        started = completions.started
        output_tokens = sum(completion.usage.output_token_count for completion in completions)
        return ModelOutput(
            model=self.model_name,
            choices=[_choice(completion, self.model_name, with_logprobs) for completion in completions],
            usage=ModelUsage(
                input_tokens=started.prompt_token_count,
                output_tokens=output_tokens,
                total_tokens=started.prompt_token_count + output_tokens,
            ),
            metadata=_metadata(completions),
            response_id=started.generation_id,
        )

    def _connected(self) -> AsyncLdaClient:
        """The client of the running loop; Inspect runs each evaluation in a loop of its own."""
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            token = self.api_key or os.environ.get(TOKEN_VARIABLE)
            self._client = AsyncLdaClient(
                self._target, credentials=self._credentials, token=token, timeout=self._timeout
            )
            self._loop = loop
        return self._client

    async def aclose(self) -> None:
        """Close the connection; calls under way are cancelled."""
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.close()

    def should_retry(self, ex: Exception) -> RetryDecision:
        """Whether the same request may succeed later; the server's suggestion of when comes with it.

        A server that never answered is an address to correct, not one to wait for.
        """
        retry_after_s = getattr(ex, "retry_after_s", None)
        match ex:
            case QueueFull() | CallerLimit() | OutOfMemory() | DeadlineTooShort():
                return RetryDecision.rate_limit(retry_after_s)
            case ServerAway() if not self._has_answered:
                return RetryDecision.no()
            case Unavailable() | SlowConsumer():
                return RetryDecision.transient(retry_after_s)
        return RetryDecision.no()

    def retry_wait(self) -> wait_base:
        """How long to wait before the next try."""
        return _AsSuggested()

    def is_auth_failure(self, ex: Exception) -> bool:
        """Whether another token may help."""
        return isinstance(ex, Unauthenticated)

    def connection_key(self) -> str:
        """What shares one limit of concurrent calls: every alpha at one server."""
        return str(self._target)

    def collapse_user_messages(self) -> bool:
        """Chat templates take turns; two in a row of one role are joined."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Chat templates take turns; two in a row of one role are joined."""
        return True

    def collapse_system_messages(self) -> bool:
        """Chat templates take one system turn."""
        return True

    def force_reasoning_history(self) -> Literal["none"]:
        """Leave out what another model of the conversation thought: templates have no place for it."""
        return "none"


class _AsSuggested(wait_base):
    """Wait as long as the server suggests and a little more, lest all come back at once; else ever longer."""

    def __init__(self) -> None:
        self._otherwise = wait_exponential_jitter(initial=1, max=60, jitter=1)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        suggested_s = getattr(error, "retry_after_s", None)
        return float(self._otherwise(retry_state) if suggested_s is None else suggested_s * random.uniform(1, 1.5))


def _credentials(
    tls: bool, ca: str | None, certificate: str | None, key: str | None, server_name: str | None
) -> Tls | None:
    """What `lda` makes of the same options and variables."""
    ca = ca or os.environ.get("LDA_TLS_CA")
    certificate = certificate or os.environ.get("LDA_TLS_CERT")
    key = key or os.environ.get("LDA_TLS_KEY")
    if not (tls or ca or certificate or key or server_name):
        return None
    return Tls(ca=ca, certificate=certificate, key=key, server_name=server_name)


def _refuse_tools(tools: Sequence[ToolInfo]) -> None:
    if tools:
        names = ", ".join(tool.name for tool in tools)
        raise Unsupported(
            f"tools: the service generates plain text and calls no tools, but the task offers {names}; "
            "run a task without tools, or have its solver describe them in the prompt and read the answer itself."
        )


def _refuse_settings(config: GenerateConfig) -> None:
    asked = [name for name in _UNSUPPORTED_SETTINGS if getattr(config, name, None)]
    if asked:
        raise Unsupported(
            f"{', '.join(asked)}: the service has no such setting, and leaving it out would change what is measured; "
            "run the evaluation without it."
        )


def _config_options(config: GenerateConfig, fixed: GenerateOptions) -> GenerateOptions:
    """The settings of Inspect in names of the contract; what is unset stays so."""
    top_candidates = config.top_logprobs or fixed.get("top_candidates")
    return {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "max_new_tokens": config.max_tokens,
        "stop": config.stop_seqs,
        "num_sequences": config.num_choices,
        "top_candidates": top_candidates,
        # Log-probabilities come from the diagnostics, because greedy draws have no other.
        "diagnostics": bool(fixed.get("diagnostics") or config.logprobs or top_candidates),
    }


def _prompt(messages: Sequence[ChatMessage], *, raw: bool) -> pb.Prompt:
    """The conversation; a last turn of the assistant is continued."""
    turns = [{"role": message.role, "content": _text(message)} for message in messages]
    if not raw:
        return build_prompt(turns, continue_final_message=turns[-1]["role"] == "assistant")
    if [turn["role"] for turn in turns] != ["user"]:
        raise Unsupported(
            "raw: sends one user message as plain text, but the conversation has the turns "
            f"{', '.join(turn['role'] for turn in turns)}; leave raw out, or run a task with one user message."
        )
    return build_prompt(turns[0]["content"], raw=True)


def _text(message: ChatMessage) -> str:
    if isinstance(message, ChatMessageTool) or getattr(message, "tool_calls", None):
        raise Unsupported("tools: the conversation holds a tool call, which the service cannot render; leave it out.")
    if not isinstance(message.content, str) and (media := {part.type for part in message.content} - {"text"}):
        raise Unsupported(
            f"content: the pair reads text alone, but a {message.role} message holds {', '.join(sorted(media))}; "
            "leave such samples out."
        )
    return str(message.text)


def _choice(completion: Completion, model: str, with_logprobs: bool) -> ChatCompletionChoice:
    return ChatCompletionChoice(
        message=ChatMessageAssistant(content=completion.text, model=model, source="generate"),
        stop_reason=_STOP_REASONS.get(completion.finish_reason, "unknown"),
        logprobs=Logprobs(content=[_logprob(token) for token in completion.tokens]) if with_logprobs else None,
    )


def _logprob(token: pb.Token) -> Logprob:
    """A drawn token under the amplified model at temperature 1, before any filter."""
    candidates = [item for item in token.diagnostics.candidates if math.isfinite(item.amplified_logprob)]
    return Logprob(
        token=_shown(token.piece),
        logprob=token.diagnostics.amplified_logprob,
        bytes=list(token.piece),
        top_logprobs=[
            TopLogprob(token=_shown(item.piece), logprob=item.amplified_logprob, bytes=list(item.piece))
            for item in candidates
        ]
        or None,
    )


def _shown(piece: bytes) -> str:
    return piece.decode(errors="replace")


def _metadata(completions: Completions) -> dict[str, Any]:
    """What it takes to draw the same again, and what the contract says of each choice."""
    started = completions.started
    metadata: dict[str, Any] = {
        "generation_id": started.generation_id,
        "seed": started.seed,
        "alpha": started.alpha,
        "pair_fingerprint": started.pair_fingerprint,
        "finish_reasons": [completion.reason_name for completion in completions],
        "matched_stops": [completion.matched_stop for completion in completions],
    }
    if any(token.HasField("diagnostics") for completion in completions for token in completion.tokens):
        metadata["mean_kl"] = [_mean_kl(completion.tokens) for completion in completions]
    return metadata


def _mean_kl(tokens: Sequence[pb.Token]) -> float | None:
    """KL(after || before) in nats, averaged over the tokens of a choice."""
    values = [token.diagnostics.after_before_kl for token in tokens]
    return fmean(values) if values else None
