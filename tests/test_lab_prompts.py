"""Prompt files: what they may hold, and that errors name file and line."""

import json

import pytest
from lda_client.lab import Prompt, PromptError, read_prompts
from lda_client.lab.prompts import to_jsonl


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_is_one_prompt_per_line(tmp_path):
    """Blank lines are skipped, spaces and odd line separators inside of a prompt are kept, ids name the line."""
    path = write(tmp_path, "q.txt", "\ufeffWho are you?\r\n\n  two\u2028parts \n")
    assert read_prompts([path]) == [Prompt("q-1", "Who are you?"), Prompt("q-3", "  two\u2028parts ")]


def test_jsonl_keeps_labels(tmp_path):
    """`prompt` or `messages`; whole-number ids are names too; other fields are labels."""
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    lines = [{"id": 7, "prompt": "Hi", "topic": "self", "hard": True}, {"messages": turns}]
    path = write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, lines)))
    expected = [
        Prompt("7", "Hi", {"topic": "self", "hard": True}),
        Prompt("q-2", (("system", "Be kind."), ("user", "Hi"))),
    ]
    assert read_prompts([path]) == expected
    copy = write(tmp_path, "copy.jsonl", to_jsonl(expected))
    assert read_prompts([copy]) == expected


def test_csv_with_breaks_inside_of_fields(tmp_path):
    """A quoted field may hold line breaks and commas; an empty id is none."""
    path = write(tmp_path, "q.csv", 'id,prompt,topic\nwho,"Who,\nare you?",self\n,Hi,\n')
    expected = [Prompt("who", "Who,\nare you?", {"topic": "self"}), Prompt("q-4", "Hi", {"topic": ""})]
    assert read_prompts([path]) == expected


def test_texts_follow_the_files(tmp_path):
    """Prompts from the command line come last, with ids of their own."""
    path = write(tmp_path, "q.txt", "one")
    assert [prompt.id for prompt in read_prompts([path], ["two"])] == ["q-1", "prompt-1"]


def test_forms_of_the_message():
    """A string is a user turn or raw text; a conversation stays one; a system turn comes first."""
    assert Prompt("a", "Hi").message(chat=False).text == "Hi"
    chat = Prompt("a", "Hi").message(chat=True, system="Be kind.").chat
    assert [(turn.role, turn.content) for turn in chat.messages] == [("system", "Be kind."), ("user", "Hi")]
    assert Prompt("a", (("user", "Hi"),)).message(chat=False).chat.messages[0].content == "Hi"


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("q.txt", b"ok\nna\xefve\n", r"q\.txt:2: is not UTF-8"),
        ("q.jsonl", '{"prompt": "a"}\n{"prompt": }', r"q\.jsonl:2: is no JSON"),
        ("q.jsonl", "[1]", r"q\.jsonl:1: must be an object"),
        ("q.jsonl", '{"prompt": "a", "messages": []}', r"q\.jsonl:1: needs one of"),
        ("q.jsonl", '{"topic": "a"}', r"q\.jsonl:1: needs one of"),
        ("q.jsonl", '{"prompt": ""}', r"q\.jsonl:1: .* not empty"),
        ("q.jsonl", '{"messages": []}', r"q\.jsonl:1: .* list of turns"),
        ("q.jsonl", '{"messages": [{"role": "user"}]}', r"q\.jsonl:1: .* is no turn"),
        ("q.jsonl", '{"id": true, "prompt": "a"}', r"q\.jsonl:1: `id`"),
        ("q.jsonl", '{"prompt": "a", "tags": [1]}', r"q\.jsonl:1: the label 'tags'"),
        ("q.jsonl", '{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}', r"q\.jsonl:3: .*'a'.* at .*q\.jsonl:1"),
        ("q.csv", "question\nhi\n", r"q\.csv:1: has no column `prompt`"),
        ("q.csv", "id,prompt\na,b,c\n", r"q\.csv:2: has not as many columns"),
        ("q.csv", "id,prompt\na\n", r"q\.csv:2: has not as many columns"),
        ("q.csv", 'prompt\n"open', r"q\.csv:2: is no CSV"),
        ("q.md", "hi", r"q\.md: \.md is none of"),
        ("q.txt", "\n\n", "There are no prompts"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, found):
    """Whatever is wrong with a file is said with its place."""
    with pytest.raises(PromptError, match=found):
        read_prompts([write(tmp_path, name, content)])


def test_a_missing_file_is_named(tmp_path):
    """So is a file that is not there."""
    with pytest.raises(PromptError, match=r"gone\.txt: cannot be read"):
        read_prompts([tmp_path / "gone.txt"])
