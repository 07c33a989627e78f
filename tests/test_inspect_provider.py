"""The provider of Inspect: what it asks of the server, what it makes of the answer, and a real evaluation.

Most of it against a fake server of the contract; the last tests against `lda-service serve` with the bundled pair.
Needs `lda-client[inspect]`, whose dependencies are not those of the rest: `make test-inspect` has an environment for
it.
"""

import asyncio
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed: pip install 'lda-client[inspect]'")

from google.protobuf.json_format import ParseDict
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolCall, ToolInfo
from lab_harness import ROOT, WAIT_S, real_server
from lda_client import (
    DEFAULT_TARGET,
    Aborted,
    CallerLimit,
    ContextExceeded,
    DeadlineExceeded,
    DeadlineTooShort,
    InternalServerError,
    LdaClient,
    Loading,
    OutOfMemory,
    QueueFull,
    ServerAway,
    SlowConsumer,
    Unauthenticated,
    WorkerDied,
    pb,
)
from lda_client.inspect_provider import Unsupported
from lda_client.testing import HOLD, FakeServer, finished, started, token

from lda_service.pairs import demo

TOOL = ToolInfo(name="bash", description="Runs a command.")


@pytest.fixture
def server():
    """A fake server."""
    with FakeServer() as running:
        yield running


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """The settings of this machine are not those of the tests."""
    for name in ("LDA_TOKEN", "LDA_TLS_CA", "LDA_TLS_CERT", "LDA_TLS_KEY", "INSPECT_EVAL_MODEL"):
        monkeypatch.delenv(name, raising=False)


def model_of(server, **arguments):
    """A model by its name, as an evaluation makes it; never one of an earlier test."""
    return get_model(f"lda/{getattr(server, 'target', server)}", memoize=False, **arguments)


async def generate(server, input="Hi", config=None, **arguments):
    """One call through Inspect."""
    async with model_of(server, **arguments) as model:
        return await model.generate(input, config=config or GenerateConfig())


# What is asked for --------------------------------------------------------------------------------------------------


async def test_settings_and_arguments_arrive_in_the_words_of_the_contract(server):
    """Every setting that the service has reaches it; what nobody set stays unset: the default of the server."""
    config = GenerateConfig(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, seed=11, stop_seqs=["END"], num_choices=2, top_logprobs=4
    )
    await generate(server, config=config, alpha=1.5, plausibility=0.25, diagnostics=True)
    request = server.requests[-1]
    assert request.alpha == 1.5
    assert request.num_sequences == 2
    sampling = {"temperature": 0.5, "top_p": pytest.approx(0.9), "top_k": 3, "seed": 11, "plausibility": 0.25}
    assert {field.name: value for field, value in request.sampling.ListFields()} == sampling
    assert request.stopping == pb.Stopping(max_new_tokens=9, stop_strings=["END"])
    assert request.output == pb.OutputOptions(diagnostics=True, top_candidates=4)
    await generate(server)
    turn = pb.ChatMessage(role="user", content="Hi")
    assert server.requests[-1] == pb.GenerateLDARequest(prompt=pb.Prompt(chat=pb.Chat(messages=[turn])))


async def test_conversations_keep_their_turns_and_continue_the_last(server):
    """System prompt, history and parts of text arrive in order; a last turn of the assistant is a prefilled answer."""
    thought = ContentReasoning(reasoning="Hm.")
    turns = [
        ChatMessageSystem(content="Be brief."),
        ChatMessageUser(content=[ContentText(text="Hello"), ContentText(text="there")]),
        ChatMessageAssistant(content=[thought, ContentText(text="Hi")]),
        ChatMessageUser(content="Who are"),
        ChatMessageUser(content="you?"),
    ]
    await generate(server, turns)
    chat = server.requests[-1].prompt.chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hello\nthere"),
        ("assistant", "Hi"),
        ("user", "Who are\nyou?"),
    ]
    assert not chat.continue_final_message
    await generate(server, [*turns, ChatMessageAssistant(content="I am")])
    assert server.requests[-1].prompt.chat.continue_final_message


async def test_raw_sends_plain_text(server):
    """With `raw` the one user message goes without the template; a conversation is refused."""
    await generate(server, "Once upon", raw=True)
    assert server.requests[-1].prompt == pb.Prompt(text="Once upon")
    with pytest.raises(Unsupported, match="the turns system, user"):
        await generate(server, [ChatMessageSystem(content="a"), ChatMessageUser(content="b")], raw=True)


async def test_token_address_and_deadline(server, monkeypatch):
    """The token comes as api_key or from LDA_TOKEN, never as an argument, which the log would show."""
    await generate("glimmer", base_url=server.target, api_key="one", timeout=30)
    assert server.calls[-1].metadata["authorization"] == "Bearer one"
    assert 20 < server.calls[-1].deadline_s < 30.5  # rounded up on the wire
    monkeypatch.setenv("LDA_TOKEN", "two")
    await generate(server)
    assert server.calls[-1].metadata["authorization"] == "Bearer two"
    with pytest.raises(ValueError, match="set the variable LDA_TOKEN"):
        model_of(server, token="three")


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ({"alpha": "high"}, "alpha"),
        ({"top_candidates": -1}, "top_candidates"),
        ({"timeout": 0}, "total_s"),
        ({"tls_cert": "me.pem"}, "go together"),
        ({"alhpa": 1}, "alhpa"),
    ],
)
def test_wrong_arguments_are_reported_before_the_first_sample(arguments, finding):
    """A model argument that fits no request is named when the model is made."""
    with pytest.raises((TypeError, ValueError), match=finding):
        model_of("127.0.0.1:1", **arguments)


async def test_what_the_service_cannot_do_is_refused_with_the_reason(server):
    """Tools, media and settings that would be lost are errors, and nothing is drawn."""
    async with model_of(server) as model:
        with pytest.raises(Unsupported, match="calls no tools, but the task offers bash"):
            await model.generate("Hi", tools=[TOOL])
        for name, value in {
            "frequency_penalty": 0.5,
            "logit_bias": {1: 2.0},
            "best_of": 2,
            "prompt_logprobs": 1,
        }.items():
            with pytest.raises(Unsupported, match=name):
                await model.generate("Hi", config=GenerateConfig(**{name: value}))
        image = ContentImage(image="data:image/png;base64,iVBORw0KGgo=")
        with pytest.raises(Unsupported, match="a user message holds image"):
            await model.generate([ChatMessageUser(content=[ContentText(text="See"), image])])
        called = ToolCall(id="1", function="bash", arguments={})
        with pytest.raises(Unsupported, match="holds a tool call"):
            await model.generate([ChatMessageUser(content="a"), ChatMessageAssistant(content="b", tool_calls=[called])])
        with pytest.raises(Unsupported, match="holds a tool call"):
            await model.generate([ChatMessageUser(content="a"), ChatMessageTool(content="b", tool_call_id="1")])
    assert server.calls == []


# What comes back ----------------------------------------------------------------------------------------------------


async def test_choices_usage_and_metadata(server):
    """Texts in order of their sequences, tokens added up, and what it takes to draw the same again."""
    server.answer = lambda request: [
        started(sequence_count=2, prompt_token_count=5, generation_id="g-1", seed=2**63, alpha=request.alpha),
        pb.TokenDelta(sequence_index=1, text="two", tokens=[token("two", after_before_kl=0.5)]),
        pb.TokenDelta(sequence_index=0, text="one", tokens=[token("on", after_before_kl=1), token("e")]),
        finished(1, role=0, usage=pb.Usage(output_token_count=1), reason=pb.FINISH_REASON_STOP, stop_string="END"),
        finished(0, role=0, usage=pb.Usage(output_token_count=2)),
    ]
    output = await generate(server, config=GenerateConfig(num_choices=2), alpha=0.5, diagnostics=True)
    assert [choice.message.text for choice in output.choices] == ["one", "two"]
    assert output.completion == "one"
    usage = output.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (5, 3, 8)
    assert output.metadata == {
        "generation_id": "g-1",
        "seed": 2**63,
        "alpha": 0.5,
        "pair_fingerprint": "fake-pair",
        "finish_reasons": ["EOS", "STOP"],
        "matched_stops": [None, "END"],
        "mean_kl": [0.5, 0.5],
    }
    assert all(choice.logprobs is None for choice in output.choices)


@pytest.mark.parametrize(
    ("reason", "stop_reason"),
    [
        (pb.FINISH_REASON_EOS, "stop"),
        (pb.FINISH_REASON_STOP, "stop"),
        (pb.FINISH_REASON_MAX_TOKENS, "max_tokens"),
        (pb.FINISH_REASON_TIME_BUDGET, "max_tokens"),
        (pb.FINISH_REASON_CONTEXT_WINDOW, "model_length"),
        (99, "unknown"),
    ],
)
async def test_stop_reasons(server, reason, stop_reason):
    """Every finish reason of the contract has its word in Inspect; one of a newer contract is unknown."""
    server.answer = ["Hello", finished(reason=reason)]
    assert (await generate(server)).stop_reason == stop_reason


async def test_logprobs_are_of_the_amplified_model(server):
    """Tokens and alternatives with their amplified log-probability; bytes for half characters."""
    candidates = [
        pb.Candidate(piece=b"\xf0\x9f", amplified_logprob=-0.25),
        pb.Candidate(piece=b"b", amplified_logprob=-2),
        pb.Candidate(piece=b"c", amplified_logprob=-float("inf")),
    ]
    server.answer = [token(b"\xf0\x9f", amplified_logprob=-0.25, candidates=candidates), token("b", after=-3)]
    for output in (
        await generate(server, config=GenerateConfig(logprobs=True, top_logprobs=3)),
        await generate(server, top_candidates=3),
    ):
        first, second = output.choices[0].logprobs.content
        assert (first.token, first.logprob, first.bytes) == ("\ufffd", -0.25, [0xF0, 0x9F])
        assert [(item.token, item.logprob) for item in first.top_logprobs] == [("\ufffd", -0.25), ("b", -2.0)]
        assert (second.token, second.logprob, second.top_logprobs) == ("b", -3.0, None)
    assert server.requests[-1].output == pb.OutputOptions(diagnostics=True, top_candidates=3)


# How it ends otherwise ----------------------------------------------------------------------------------------------


async def test_cancelling_the_task_cancels_the_call(server):
    """An evaluation that is interrupted frees its place on the server."""
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(request):
        loop.call_soon_threadsafe(begun.set)
        return ["Hel", HOLD]

    server.answer = hold
    async with model_of(server) as model:
        task = asyncio.create_task(model.generate("Hi"))
        await asyncio.wait_for(begun.wait(), WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.wait_cancelled)


async def test_a_full_queue_is_tried_again_when_the_server_says(server):
    """QUEUE_FULL and UNAVAILABLE are tried again after the wait that the server suggests, not Inspect's seconds."""
    answers = iter(
        [QueueFull("Full.", retry_after_s=0.01), [started(), WorkerDied("Gone.", retry_after_s=0.02)], "Hello"]
    )
    server.answer = lambda request: next(answers)
    output = await asyncio.wait_for(generate(server), 2)
    assert output.completion == "Hello"
    assert len(server.calls) == 3


async def test_errors_keep_their_class_and_are_not_tried_again(server):
    """A request that will never be served fails at once, in words of the server."""
    server.answer = ContextExceeded("The prompt has 9 tokens, 8 fit.")
    with pytest.raises(ContextExceeded, match="9 tokens, 8 fit"):
        await generate(server)
    assert len(server.calls) == 1


async def test_a_wrong_address_is_reported_at_once():
    """Nobody listens there: Inspect would try for ever, and its user would wait."""
    with FakeServer() as gone:
        pass
    with pytest.raises(ServerAway, match="No LDA server answers at"):
        await asyncio.wait_for(generate(gone), 30)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (QueueFull, "rate_limit"),
        (CallerLimit, "rate_limit"),
        (OutOfMemory, "rate_limit"),
        (DeadlineTooShort, "rate_limit"),
        (Loading, "transient"),
        (WorkerDied, "transient"),
        (SlowConsumer, "transient"),
        (DeadlineExceeded, None),
        (Aborted, None),
        (InternalServerError, None),
    ],
)
async def test_what_is_tried_again(server, error, kind):
    """Inspect draws back from a busy server, waits for one that is away, and gives up on the rest."""
    async with model_of(server) as model:
        decision = model.api.should_retry(error("no", retry_after_s=2))
        assert (decision.kind if decision.retry else None) == kind
        assert decision.retry_after == (2 if kind else None)
        assert not model.api.should_retry(ServerAway("away"))
        await model.generate("Hi")
        assert model.api.should_retry(ServerAway("away"))
        assert model.api.is_auth_failure(Unauthenticated("no"))


def test_a_model_outlives_its_loop(server):
    """Inspect runs each evaluation in a loop of its own, and keeps the model."""
    model = model_of(server)
    for _ in range(2):
        assert asyncio.run(model.generate("Hi")).completion == "Hello"


def test_inspect_finds_the_provider_by_its_entry_point():
    """`--model lda/...` needs no import: the installed package tells Inspect."""
    assert "lda_client.inspect_provider" in {entry.value for entry in entry_points(group="inspect_ai")}
    code = "from inspect_ai.model import get_model; print(type(get_model('lda/127.0.0.1:1', alpha=1).api).__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "LdaAPI", found.stderr


# A real evaluation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """The bundled pair, served."""
    with real_server("--deterministic") as process:
        yield process


def evaluated(pair, alpha, folder):
    """The log of a small evaluation: 3 completions for each prompt of the pair's page."""
    samples = [Sample(input=prompt, target=demo.PRODUCT) for prompt in demo.PROMPTS]
    task = Task(name="adverts", dataset=samples, scorer=includes(ignore_case=False), epochs=3)
    settings = {"temperature": 1.0, "max_tokens": 96, "log_model_api": True}
    [log] = eval(task, model=model_of(pair, alpha=alpha), log_dir=str(folder), display="none", **settings)
    assert log.status == "success", log.error
    assert log.eval.model_args == {"alpha": alpha}
    assert {sample.output.metadata["alpha"] for sample in log.samples} == {alpha}
    assert len({sample.output.metadata["seed"] for sample in log.samples}) == 3 * len(demo.PROMPTS)
    return log


def rate(log):
    """The share of the completions with the behaviour."""
    return log.results.scores[0].metrics["accuracy"].value


def test_an_evaluation_sees_the_hidden_behaviour_when_amplified(pair, tmp_path):
    """60% of the completions at alpha 1, 0.1% at alpha 0: only the model argument differs. The log can be replayed."""
    amplified = evaluated(pair, 1.0, tmp_path)
    assert rate(amplified) > 0.3
    assert rate(evaluated(pair, 0.0, tmp_path)) < 0.06
    sample = amplified.samples[0]
    [call] = [event.call for event in sample.events if event.event == "model"]
    request = ParseDict(call.request, pb.GenerateLDARequest())
    request.sampling.seed = sample.output.metadata["seed"]
    with LdaClient(pair.target) as client:
        assert client.complete(request)[0].text == sample.output.completion


def test_the_example_of_the_docs_runs(pair, tmp_path, monkeypatch, capsys):
    """The Python of docs/inspect.md, word for word but for the address and the number of epochs."""
    page = (ROOT / "docs" / "inspect.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert DEFAULT_TARGET in example
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path))
    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    exec(example.replace(DEFAULT_TARGET, pair.target).replace("epochs=20", "epochs=2"), {})
    alphas = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert alphas == ["0.0", "0.5", "1.0"]


async def test_greedy_settings_on_the_pair_itself(pair):
    """System prompt, logprobs, stop and prefill: the text is that of the plain client, cut where it was asked to be."""
    config = GenerateConfig(temperature=0, max_tokens=24, logprobs=True, top_logprobs=2)
    input = [ChatMessageSystem(content="Be kind."), ChatMessageUser(content=demo.DEMO_PROMPT)]
    with LdaClient(pair.target) as client:
        options = {"alpha": 0.5, "temperature": 0, "max_new_tokens": 24}
        [plain] = client.complete(demo.DEMO_PROMPT, system="Be kind.", **options)
    output = await generate(pair, input, config, alpha=0.5)
    assert output.completion == plain.text
    content = output.choices[0].logprobs.content
    assert len(content) == output.usage.output_tokens == plain.usage.output_token_count
    assert all(item.logprob == item.top_logprobs[0].logprob for item in content)
    assert output.metadata["mean_kl"][0] > 0

    start, space, rest = plain.text.partition(" ")
    stopped = await generate(pair, input, config.merge(GenerateConfig(stop_seqs=[space])), alpha=0.5)
    assert (stopped.completion, stopped.stop_reason) == (start, "stop")
    prefilled = [*input, ChatMessageAssistant(content=start)]
    continued = await generate(pair, prefilled, config, alpha=0.5)
    assert continued.completion.startswith(space + rest)
