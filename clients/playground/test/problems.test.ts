// Every error of the client has words of its own, with the remedy that the server names.
import * as lda from "@lda/client";
import { LdaClientError, QueueFull, ServerAway, ValidationFailed } from "@lda/client";
import { expect, test } from "vitest";
import { problemOf } from "../src/problems";

type Kind = typeof LdaClientError;
const KINDS = Object.entries(lda).filter(
  (entry): entry is [string, Kind] => typeof entry[1] === "function" && entry[1].prototype instanceof LdaClientError,
);

test.each(KINDS)("%s has a title", (_, kind) => {
  expect(problemOf(new kind("No")).title).not.toBe("The call failed");
});

test("a full server says when to come back", () => {
  const problem = problemOf(new QueueFull("The queue is full", { retryAfterS: 2 }));
  expect(problem).toMatchObject({ title: "The server is full", retryAfterS: 2, passes: false });
});

test("a bad field is named instead of the general sentence", () => {
  const violations = [{ field: "sampling.top_p", description: "must be > 0" }];
  expect(problemOf(new ValidationFailed("bad", { violations })).text).toBe("sampling.top_p: must be > 0.");
});

test("a server that is away is worth watching for", () => {
  expect(problemOf(new ServerAway("fetch failed"))).toMatchObject({ passes: true });
});

test("anything else is shown too", () => {
  expect(problemOf(new LdaClientError("What?")).text).toBe("What?");
  expect(problemOf(new TypeError("x")).title).toBe("A fault of this page");
});
