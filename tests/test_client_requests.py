"""The client's requests: what is sent, and that what is not said is not sent."""

import pytest
from lda_client import TokenIds, pb
from lda_client._channel import Connection, Timeout
from lda_client._plans import PromptArguments, plan_generate, plan_generate_both
from lda_client._requests import build_continuation, build_prompt, generate_request, score_request

HI = pb.Prompt(text="Hi")


def turns(prompt):
    """The turns of a conversation as pairs."""
    return [(turn.role, turn.content) for turn in prompt.chat.messages]


def test_unset_stays_unset():
    """An argument that is left out, or None, is absent on the wire, and so is a group that nobody set."""
    expected = pb.GenerateLDARequest(prompt=HI)
    assert generate_request(HI) == expected
    assert generate_request(HI, alpha=None, temperature=None, stop=None, time_budget_s=None) == expected
    assert score_request(HI, HI) == pb.ScoreRequest(prompt=HI, continuation=HI)


def test_zero_is_sent():
    """Zero is a value, not an absence: greedy decoding reaches the server as temperature 0."""
    request = generate_request(HI, alpha=0.0, temperature=0.0, seed=0, top_k=0)
    assert request.HasField("alpha")
    assert {field.name for field, _ in request.sampling.ListFields()} == {"temperature", "seed", "top_k"}


def test_every_argument_reaches_its_field():
    """Each keyword fills the field of its name in the contract."""
    request = generate_request(
        HI,
        alpha=2.5,
        num_sequences=3,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        plausibility=0.0625,
        seed=2**63,
        max_new_tokens=17,
        min_new_tokens=2,
        ignore_eos=True,
        stop=["a", "b"],
        stop_token_ids=[5, 6],
        time_budget_s=1.5,
        diagnostics=True,
        top_candidates=5,
        max_tokens_per_event=8,
        max_event_delay_s=0.25,
        score_alphas=[0, 1.5],
    )
    expected = pb.GenerateLDARequest(
        prompt=HI,
        alpha=2.5,
        num_sequences=3,
        sampling=pb.Sampling(temperature=0.5, top_p=0.25, top_k=40, min_p=0.125, plausibility=0.0625, seed=2**63),
        stopping=pb.Stopping(
            max_new_tokens=17,
            min_new_tokens=2,
            ignore_eos=True,
            stop_strings=["a", "b"],
            stop_token_ids=[5, 6],
            time_budget={"seconds": 1, "nanos": 500_000_000},
        ),
        output=pb.OutputOptions(
            diagnostics=True,
            top_candidates=5,
            max_tokens_per_event=8,
            max_event_delay={"nanos": 250_000_000},
            score_alphas=[0, 1.5],
        ),
    )
    assert request == expected


def test_one_stop_string_is_not_taken_apart():
    """`stop="END"` is one stop string, not three letters."""
    assert list(generate_request(HI, stop="END").stopping.stop_strings) == ["END"]


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
        [("user", "Hi"), ("assistant", "Yes?")],
        (pb.ChatMessage(role="user", content="Hi"), ("assistant", "Yes?")),
        pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi"), pb.ChatMessage(role="assistant", content="Yes?")]),
    ],
)
def test_conversation_forms(prompt):
    """Mappings, pairs and messages of the contract are the same conversation."""
    assert turns(build_prompt(prompt)) == [("user", "Hi"), ("assistant", "Yes?")]


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), range(1, 4), TokenIds(ids=[1, 2, 3])])
def test_token_forms(prompt):
    """A sequence of integers, and `TokenIds`, are token ids."""
    assert list(build_prompt(prompt).tokens.ids) == [1, 2, 3]


def test_a_message_of_the_contract_is_copied():
    """A `pb.Prompt` is sent as it is, and the caller's own object is left alone."""
    mine = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]))
    sent = build_prompt(mine, system="Be brief.")
    assert turns(sent) == [("system", "Be brief."), ("user", "Hi")]
    assert turns(mine) == [("user", "Hi")]


def test_system_and_prefill():
    """`system` puts a turn in front; `continue_final_message` marks the last one as open."""
    prompt = build_prompt([("user", "Hi"), ("assistant", "Well,")], system="Be brief.", continue_final_message=True)
    assert turns(prompt) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Well,")]
    assert prompt.chat.continue_final_message


@pytest.mark.parametrize(
    ("has_template", "raw", "expected"),
    [
        (True, False, pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]))),
        (False, False, HI),
        (True, True, HI),
    ],
)
def test_plain_string(has_template, raw, expected):
    """A plain string is one user turn where the pair has a chat template, and plain text where not or with `raw`."""
    plan = plan_generate(PromptArguments("Hi", None, raw, continue_final_message=False), {})
    plan.settle(has_template)
    assert plan.request.prompt == expected


def test_a_conversation_stays_one_without_a_template():
    """Only a plain string gives way: a conversation is left for the server to refuse."""
    plan = plan_generate_both(PromptArguments([("user", "Hi")], None, False, continue_final_message=False), {})
    plan.settle(has_chat_template=False)
    assert turns(plan.request.prompt) == [("user", "Hi")]


def test_a_continuation_is_never_templated():
    """What is scored is plain text or token ids."""
    assert build_continuation("there").text == "there"
    assert list(build_continuation([4, 5]).tokens.ids) == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_sequences": -1}, "num_sequences"),
        ({"top_k": 2**40}, "top_k"),
        ({"temperature": "hot"}, "temperature"),
        ({"time_budget_s": float("nan")}, "time_budget_s"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
    ],
)
def test_an_impossible_value_is_named(arguments, named):
    """A value that no message can hold raises an ordinary error that names the argument."""
    with pytest.raises((TypeError, ValueError), match=named):
        generate_request(HI, **arguments)


def test_an_unknown_argument_is_refused():
    """A typo is a TypeError, never silently ignored."""
    with pytest.raises(TypeError, match="temprature"):
        generate_request(HI, temprature=1)


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ([], {}),
        ([{"role": "user"}], {}),
        (b"Hi", {}),
        ({"role": "user", "content": "Hi"}, {}),
        (7, {}),
        ([("user", "Hi")], {"raw": True}),
        ([1, 2], {"system": "Be brief."}),
        ("Hi", {"raw": True, "system": "Be brief."}),
        ("Hi", {"continue_final_message": True}),
    ],
)
def test_no_prompt(prompt, arguments):
    """What is no prompt, or does not go together, is refused before anything is sent."""
    with pytest.raises((TypeError, ValueError)):
        build_prompt(prompt, **arguments)


def test_timeouts():
    """A call's own timeout wins over the client's; the short calls have their own; nonsense is refused."""
    connection = Connection(token="t", timeout=Timeout(total_s=60))
    metadata = (("authorization", "Bearer t"), ("x-lda-prompt-hash", "ab"))
    assert connection.stream_options(None, "ab") == {"timeout": 60, "metadata": metadata}
    assert connection.stream_options(5, "ab")["timeout"] == 5
    assert connection.lookup_options(None)["timeout"] == 30
    assert "t'" not in repr(Connection(token="t"))
    with pytest.raises(ValueError, match="connect_s"):
        Timeout(connect_s=0)
