import assert from "node:assert/strict";
import { test } from "node:test";
import { chat, text, tokens } from "@lda/client";

test("a prompt is text, turns or token ids", () => {
  assert.deepEqual(text("hi").form, { case: "text", value: "hi" });
  const ids = tokens(new Set([1, 2])).form;
  assert.ok(ids.case === "tokens");
  assert.deepEqual(ids.value.ids, [1, 2]);
});

test("a conversation keeps its turns; a string is one turn of the user", () => {
  const turns = [
    { role: "user", content: "hi" },
    { role: "assistant", content: "I am" },
  ];
  const { form } = chat(turns, { continueFinalMessage: true });
  assert.ok(form.case === "chat");
  assert.equal(form.value.continueFinalMessage, true);
  assert.deepEqual(
    form.value.messages.map(({ role, content }) => ({ role, content })),
    turns,
  );
  const single = chat("hi").form;
  assert.ok(single.case === "chat");
  assert.deepEqual([single.value.messages[0]?.role, single.value.messages[0]?.content], ["user", "hi"]);
});

for (const half of ["\ud83d", "a\ude42", "\ude42\ud83d"]) {
  test(`half of a character is refused, not replaced: ${JSON.stringify(half)}`, () => {
    assert.throws(() => text(half), /TypeError.*half of a character/);
    assert.throws(() => chat(half), /TypeError.*half of a character/);
    assert.doesNotThrow(() => text("🙂"));
  });
}
