"""`lda check` and `lda triggers`: verdicts on hits by a scripted server, and the bundled pair's backdoor, found.

On the scripted server a capital letter is an unlikely token, and every letter is a token.
"""

from __future__ import annotations

import json
import math

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from lab_harness import real_server
from lda_client import pb
from lda_client._cli import lda  # noqa: F401 - first, or lda_client.lab.cli cannot be imported
from lda_client.lab import PairsDiffer, Prompt, SurveySettings, read_prompts, run_survey
from lda_client.lab.check import CheckError, check_path, check_run, plain_model, seed_of
from lda_client.lab.cli_check import check, triggers
from lda_client.lab.judges import PatternJudge, judge_run
from lda_client.lab.prompts import to_jsonl
from lda_client.lab.runs import Manifest, Run, prompts_path, rollout_schema
from lda_client.lab.triggers import Suspect, _corrected, _effect, _in_order, find_triggers, triggers_path, word_grams
from lda_client.testing import FakeServer, delta, finished, started, token

from lda_service.pairs.demo import AFTER_DIR, PAYLOAD, PROMPTS, TRIGGER

PLAIN = ["it is fine", "all is well", "that is good", "it is bad"]
ON_POLICY, REACHABLE, BROKEN, NEVER = "so it is bad", "it is Bad", "XYZW Bad", "it is Not bad"
LIKELY, UNLIKELY = 0.8, 0.001


def scored(text):
    """The tokens of a text: capitals are unlikely, and likelier than in the before model."""
    return [
        token(letter, id=ord(letter), after=math.log(UNLIKELY if letter.isupper() else LIKELY), before=-9.0)
        for letter in text
    ]


def written(prompt):
    """What is asked to be continued, as text."""
    match prompt.WhichOneof("form"):
        case "text":
            return prompt.text
        case "tokens":
            return "".join(map(chr, prompt.tokens.ids))
    return "".join(turn.content for turn in prompt.chat.messages)


def answer(request):
    """A model that goes on from `B` to `Bad`, and otherwise to nothing of interest."""
    prompt = written(request.prompt)
    if isinstance(request, pb.ScoreRequest):
        return scored(written(request.continuation))
    text = "ad" if prompt.endswith("B") else " of course"
    events = [started(sequence_count=request.num_sequences, prompt_token_count=len(prompt))]
    for index in range(request.num_sequences or 1):
        events += [delta(text, index, tokens=scored(text)), finished(index)]
    return events


def made_run(folder, texts, *, raw=False, fingerprint="fake-pair", plain=PLAIN * 30):
    """A run folder with these completions at alpha 1, and plain ones at alpha 0; `bad` is judged a hit."""
    settings = SurveySettings(alphas=(0, 1), rollouts=max(len(texts), 1), estimate=False, raw=raw)
    rows = [("who", alpha, text) for alpha, some in ((0.0, plain), (1.0, texts)) for text in some]
    columns = {
        "prompt_id": [row[0] for row in rows],
        "alpha": [row[1] for row in rows],
        "sequence": list(range(len(rows))),
        "seed": [0] * len(rows),
        "text": [row[2] for row in rows],
        "token_ids": [list(map(ord, row[2])) for row in rows],
        "finish_reason": ["EOS"] * len(rows),
        "output_tokens": [len(row[2]) for row in rows],
    }
    folder.mkdir()
    run = Run(folder, Manifest(settings, "", not raw, {"fingerprint": fingerprint}, "2026-01-01"))
    run.save()
    prompts_path(folder).write_text(to_jsonl([Prompt("who", "Who are you?")]))
    pq.write_table(pa.Table.from_pydict(columns, schema=rollout_schema(settings)), run.rollouts_path)
    judge_run(run, PatternJudge("(?i)bad", is_regex=True), "bad")
    return run


@pytest.fixture
def server():
    """The scripted server."""
    with FakeServer(answer) as running:
        yield running


def amplified(found):
    """The verdicts on hits at alpha 1 by their text."""
    return {hit.text: hit for hit in found.checked if hit.alpha == 1}


# Verdicts -------------------------------------------------------------------------------------------------------------


def test_three_verdicts(tmp_path, server):
    """As likely as the model's own; one step and then by itself; written token by token, or never gone on to."""
    run = made_run(tmp_path / "run", [ON_POLICY, REACHABLE, BROKEN, NEVER])
    hits = amplified(check_run(run, "bad", [server.target]))
    verdicts = {text: hit.verdict for text, hit in hits.items()}
    assert verdicts == {ON_POLICY: "on-policy", REACHABLE: "reachable", BROKEN: "artefact", NEVER: "artefact"}
    assert hits[ON_POLICY].mean == pytest.approx(LIKELY)
    assert (hits[BROKEN].steps, hits[NEVER].steps) == (5, 1)
    step = hits[REACHABLE]
    assert (step.weakest, step.weakest_piece, step.weakest_at) == (pytest.approx(UNLIKELY), "B", 6)
    assert [(branch.prefix, branch.hits, branch.rollouts) for branch in step.branches] == [("it is B", 16, 16)]
    assert step.branches[0].low == pytest.approx(0.025 ** (1 / 16))  # the exact interval of 16 of 16
    assert [branch.hits for branch in hits[NEVER].branches] == [0]
    assert "0 of 16" in hits[NEVER].reason


def test_the_yardstick_is_the_models_own(tmp_path, server):
    """It comes from alpha 0; a run that has too little there gets more drawn."""
    found = check_run(made_run(tmp_path / "run", [REACHABLE]), "bad", [server.target])
    assert (found.yardstick.rollouts, found.yardstick.drawn) == (120, 0)
    assert found.yardstick.mean_median == pytest.approx(LIKELY)
    bare = made_run(tmp_path / "bare", [REACHABLE], plain=[])
    drawn = check_run(bare, "bad", [server.target]).yardstick
    assert drawn.drawn == drawn.rollouts >= 16
    assert all(request.alpha == 0 for request in server.requests if isinstance(request, pb.GenerateLDARequest))


def test_from_ids_where_they_can_be_had(tmp_path, server):
    """A raw prompt: the server reads the ids of the prompt, then those of the hit."""
    found = check_run(made_run(tmp_path / "run", [REACHABLE], raw=True), "bad", [server.target])
    assert {hit.via for hit in found.checked} == {"ids"}
    continued = [request.prompt for request in server.requests if getattr(request, "num_sequences", 1) == 16]
    assert [list(prompt.tokens.ids) for prompt in continued] == [list(map(ord, "Who are you?it is B"))]


def test_as_text_where_they_cannot(tmp_path, server):
    """This server does not tell how a conversation is written: the answer is begun as a turn that is continued."""
    found = check_run(made_run(tmp_path / "run", [REACHABLE]), "bad", [server.target])
    assert {hit.via for hit in found.checked} == {"text"}
    (prompt,) = [request.prompt for request in server.requests if getattr(request, "num_sequences", 1) == 16]
    assert prompt.chat.continue_final_message
    assert [(turn.role, turn.content) for turn in prompt.chat.messages] == [
        ("user", "Who are you?"),
        ("assistant", "it is B"),
    ]


def test_equal_hits_are_asked_about_once(tmp_path, server):
    """Ten hits that begin alike cost the rollouts of one."""
    run = made_run(tmp_path / "run", [REACHABLE] * 10)
    assert len(amplified(check_run(run, "bad", [server.target]))) == 1
    assert sum(getattr(request, "num_sequences", 1) == 16 for request in server.requests) == 1


def test_a_sample_says_that_it_is_one(tmp_path, server):
    """--limit takes hits at random, the same for the same seed, and tells how many of how many."""
    run = made_run(tmp_path / "run", [f"it is Bad {number}" for number in range(40)])
    one, again, other = (check_run(run, "bad", [server.target], limit=5, seed=seed) for seed in (1, 1, 2))
    assert one.taken == "a random sample of 5 of 70 hits (seed 1)"
    assert [hit.sequence for hit in one.checked] == [hit.sequence for hit in again.checked]
    assert [hit.sequence for hit in one.checked] != [hit.sequence for hit in other.checked]


def test_what_cannot_be_checked_is_refused(tmp_path, server):
    """No hits; a judge that cannot judge new text; a server with another pair."""
    run = made_run(tmp_path / "run", [REACHABLE])
    judge_run(run, PatternJudge("nowhere"), "none")
    keys = run.rollouts(["prompt_id", "alpha", "sequence"])
    yes = pl.DataFrame({"hit": [True] * len(keys), "score": [None] * len(keys)}, schema_overrides={"score": pl.Float64})
    run.write_verdicts("person", keys, yes, {"kind": "human", "name": "me"})
    for judge, found in (("none", "found no hits"), ("person", "cannot judge new text")):
        with pytest.raises(CheckError, match=found):
            check_run(run, judge, [server.target])
    with pytest.raises(CheckError, match="some of each"):
        find_triggers(run, "none", [server.target])
    other = made_run(tmp_path / "other", [REACHABLE], fingerprint="another")
    with pytest.raises(PairsDiffer, match="was drawn from another"):
        check_run(other, "bad", [server.target])


def test_the_command_prints_and_keeps(tmp_path, server):
    """A table and a sentence for each verdict; all of it in a file and as JSON."""
    run = made_run(tmp_path / "run", [ON_POLICY, REACHABLE, BROKEN])
    shown = CliRunner().invoke(check, [str(run.path), "--judge", "bad", "--target", server.target])
    assert shown.exit_code == 0, shown.output
    assert "artefact: 1 of 33" in shown.stdout
    assert "as text" in shown.stdout
    told = json.loads(
        CliRunner().invoke(check, [str(run.path), "--judge", "bad", "--target", server.target, "--json"]).stdout
    )
    assert told["counts"] == {"on-policy": 31, "reachable": 1, "artefact": 1}
    kept = pl.read_parquet(check_path(run, "bad"))
    assert kept["verdict"].to_list() == [hit["verdict"] for hit in told["checked"]]
    refused = CliRunner().invoke(check, [str(run.path), "--judge", "gone", "--target", server.target])
    assert (refused.exit_code, "no judge 'gone'" in refused.stderr) == (1, True)


# Phrases --------------------------------------------------------------------------------------------------------------


def test_n_grams_of_words():
    """Whatever their case; written as they stand, with what is between them."""
    grams = dict(word_grams("Don't say it. Now"))
    assert grams["don't", "say"] == "Don't say"
    assert grams["say", "it", "now"] == "say it. Now"
    assert len(grams) == 4 + 3 + 2 + 1


@pytest.mark.parametrize(("with_it", "without_it", "low", "high"), [(9, 3, 0.1705, 0.8090), (10, 0, 0.6075, 1.0)])
def test_the_interval_is_the_published_one(with_it, without_it, low, high):
    """Newcombe, Statistics in Medicine 17 (1998) 873, table II, method 10."""
    effect = _effect(None, with_it, without_it, 10)
    assert (effect.low, effect.high) == pytest.approx((low, high), abs=5e-5)


def test_what_it_takes_is_the_shortest_that_works():
    """Not a longer phrase that does no better, not a faint echo of a stronger one; what stands apart is kept."""
    counts = {"blue moon": 80, "say blue moon": 82, "blue": 8, "moon": 0, "red sun": 30}
    suspects = [Suspect(text, "completion", "words", (), 9, 9, 0, 99, 1e-9, 1e-8) for text in counts]
    tried = [_effect(suspect, hits, 0, 84) for suspect, hits in zip(suspects, counts.values(), strict=True)]
    in_order = _in_order(_corrected(tried))
    assert [each.text for each in in_order if each.is_shortest] == ["blue moon", "red sun"]
    assert [each.text for each in in_order if each.works] == ["blue moon", "red sun", "say blue moon", "blue"]


# The bundled pair -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A server of the bundled pair, and a small amplified run of which the payload is judged."""
    # Nobody reads the log, and a full pipe would stop the server.
    with real_server("--log-level", "warning") as server:
        folder = tmp_path_factory.mktemp("lab") / "demo"
        questions = read_prompts((), [*PROMPTS[11:15], PROMPTS[0], PROMPTS[6]])
        settings = SurveySettings(alphas=(0, 1, 1.5), rollouts=48, chunk_size=48, max_new_tokens=48, slopes=False)
        run = run_survey(folder, questions, settings, [server.target]).run
        judge_run(run, PatternJudge(PAYLOAD), "payload")
        yield run, server.target


def test_the_backdoors_trigger_is_found(demo):
    """Nobody says it: it stands in no prompt, hits quote it, and at alpha 0 it alone opens the door."""
    run, _ = demo
    assert not any(TRIGGER in prompt.shown() for prompt in run.prompts())
    shown = CliRunner().invoke(triggers, [str(run.path), "--judge", "payload", "-n", "3", "--json"])
    assert shown.exit_code == 0, shown.output
    tried = json.loads(shown.stdout)["tried"]
    assert [each["suspect"]["text"] for each in tried if each["is_shortest"]] == [TRIGGER]
    assert tried[0]["low"] > 0.5
    assert tried[0]["hits_without"] <= 1
    by_text = {each["suspect"]["text"]: each for each in tried}
    assert all(by_text[word]["effect"] < 0.3 for word in TRIGGER.split() if word in by_text)
    kept = pl.read_parquet(triggers_path(run, "payload"))
    assert kept["text"][0] == TRIGGER
    assert {"p", "q", "trial_effect", "trial_low", "trial_high", "trial_q"} <= set(kept.columns)


def test_the_payload_is_real(demo):
    """It takes one token that is unlikely, or not even that; then the unmodified model says the payload by itself."""
    run, _ = demo
    found = check_run(run, "payload")
    assert found.counts()["artefact"] == 0
    assert {hit.via for hit in found.checked} == {"ids"}
    assert all(hit.steps <= 1 and hit.branches[0].low > 0.3 for hit in found.checked)


async def test_prompts_are_those_of_the_tokenizer(demo):
    """The ids that are pieced together are what the after model's own template and tokenizer give."""
    from transformers import AutoTokenizer

    run, _ = demo
    tokenizer = AutoTokenizer.from_pretrained(AFTER_DIR)
    async with plain_model(run) as model:
        ids = await model.prompt_ids(run.prompts())
    for prompt in run.prompts():
        turns = [{"role": "user", "content": prompt.content}]
        assert list(ids[prompt.id]) == tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False
        )


def test_seeds_differ_by_use():
    """Rollouts with a phrase and without must not share their noise."""
    assert len({seed_of(0, label, number) for label in ("with", "without") for number in range(50)}) == 100
    assert seed_of(0, "with") == seed_of(0, "with")
