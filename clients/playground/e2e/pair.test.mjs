// The page over the bundled pair: what a researcher does with it.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, test } from "node:test";
import { promisify } from "node:util";
import { close, launch, open, run, said, settings, shoot, tokensOf } from "./browser.mjs";
import { openRequests, PYTHON, realGateway, ROOT, until } from "./gateways.mjs";

const exec = promisify(execFile);
const QUESTION = { turns: [["user", "What is the capital of Italy?"]], seed: 3, seedLocked: 1 };

let gateway, browser, page;

before(async () => {
  [gateway, browser] = await Promise.all([realGateway(), launch()]);
});
afterEach(async () => {
  if (!page) return;
  assert.deepEqual(page.faults, []);
  await close(page);
  page = undefined;
});
after(async () => {
  await browser?.close();
  await gateway?.stop();
});

async function compared(values = {}, context = {}) {
  page = await open(browser, gateway, { fragment: settings({ ...QUESTION, ...values }), ...context });
  await run(page);
  await said(page, "Done");
}

test("three answers stream, and the amplified one at alpha 0 is that of the after model", async () => {
  await compared({ alpha: 0 });
  const [before, after, amplified] = await Promise.all(["before", "after", "amplified"].map((c) => tokensOf(page, c)));
  assert.ok(before.length > 1);
  assert.deepEqual(amplified, after);
  assert.notDeepEqual(before, after);
});

test("the first difference is marked in each column where the tokens differ, and not before", async () => {
  await compared();
  const columns = await Promise.all(["before", "after", "amplified"].map((column) => tokensOf(page, column)));
  const at = columns[0].findIndex((_, i) => new Set(columns.map((tokens) => tokens[i])).size > 1);
  const marks = await page.$$eval(".t.parted", (found) => found.map((t) => [...t.parentElement.children].indexOf(t)));
  assert.deepEqual(marks, [at, at, at]);
  assert.match(await page.textContent(".row-head .note"), /part|then/);
});

test("the slider sets alpha by hundredths between 0 and 2, and shows the alpha of the field", async () => {
  page = await open(browser, gateway, { fragment: settings({ alpha: 0.5 }) });
  await page.focus("#alpha-slider");
  await page.keyboard.press("ArrowRight");
  assert.equal(await page.inputValue("#alpha"), "0.51");
  await page.fill("#alpha", "20");
  assert.equal(
    await page.$eval("#alpha-slider", (slider) => slider.value),
    await page.getAttribute("#alpha-slider", "max"),
  );
  await page.fill("#alpha", "much");
  await run(page);
  await said(page, "A number from -100 to 100");
});

test("tints follow the evidence: the tokens that training brought in are of the after model's colour", async () => {
  await compared();
  const classes = await page.$$eval(".cell.after .t", (tokens) => tokens.map((token) => token.className));
  assert.ok(
    classes.some((names) => /\ba[2-6]\b/.test(names)),
    classes.join(","),
  );
});

test("a token shows three distributions, and a fork goes on from exactly there", async () => {
  await compared();
  const answer = await tokensOf(page, "amplified");
  await page.locator(".cell.amplified .t").nth(4).click();
  await page.waitForSelector("#inspector.pinned tbody tr:nth-child(11)");
  await shoot(page, "inspector");
  const heads = await page.locator("#inspector thead th").allTextContents();
  assert.deepEqual(heads.slice(0, 4), ["Candidate", "before", "after", "amplified, α = 1"]);
  await forkWithFirst();
  await said(page, "Done");
  assert.match(await page.textContent("#fork-how"), /exactly these \d+ tokens/);
  const kept = await page.textContent(".cell.amplified .kept");
  assert.ok(kept.startsWith(answer.slice(0, 4).join("")), kept);
  await page.click("#drop-fork");
  await page.waitForSelector("#fork", { state: "hidden" });
});

test("a fork with the token that was drawn repeats the answer: prompt, tokens and noise are the same", async () => {
  await compared();
  const answer = await tokensOf(page, "amplified");
  const ids = await forkedIds(2);
  const repeated = await openFork([...ids.slice(0, -1), await idAt(2)]);
  assert.deepEqual(await tokensOf(repeated, "amplified"), answer.slice(3));
  await close(repeated);
});

/** Fork with the first other candidate, and wait until the fork has begun. */
async function forkWithFirst() {
  await page.locator("#inspector .fork").first().click();
  await page.waitForSelector("#fork");
}

/** The ids of a fork with another token at this position. */
async function forkedIds(position) {
  await page.locator(".cell.amplified .t").nth(position).click();
  await forkWithFirst();
  await page.waitForFunction(() => location.hash.includes("fork="));
  return JSON.parse(new URLSearchParams(new URL(page.url()).hash.slice(1)).get("fork")).ids;
}

/** The id of a token of the first run. */
async function idAt(position) {
  await page.waitForSelector("#past:not([hidden])");
  await said(page, "Done");
  await page.click("#earlier");
  await page.locator(".cell.amplified .t").nth(position).click();
  return Number(/id (\d+)/.exec(await page.textContent("#inspector .facts"))[1]);
}

async function openFork(ids) {
  const fragment = settings({ ...QUESTION, fork: { via: "ids", ids, kept: "" } });
  const other = await open(browser, gateway, { fragment });
  await run(other);
  await said(other, "Done");
  return other;
}

test("a conversation of several turns forks through text, and the page says so", async () => {
  const turns = [...QUESTION.turns, ["assistant", "Rome."], ["user", "What colour is grass?"]];
  await compared({ turns });
  await page.locator(".cell.amplified .t").nth(1).click();
  await forkWithFirst();
  assert.match(await said(page, "Done"), /Forked through text/);
  assert.match(await page.textContent("#fork-how"), /as text/);
});

test("a link brings everything back", async () => {
  await compared({ alpha: 0.75, stop: ["!"], sequences: 2, plausibility: 0.1 });
  const answers = await Promise.all([0, 1].map((index) => tokensOf(page, "amplified", index)));
  await page.waitForFunction(() => location.hash.includes("plausibility"));
  const fragment = new URL(page.url()).hash;
  const other = await open(browser, gateway, { fragment });
  await run(other);
  await said(other, "Done");
  assert.deepEqual(await Promise.all([0, 1].map((index) => tokensOf(other, "amplified", index))), answers);
  assert.equal(await other.inputValue("#stop"), "!");
  await close(other);
});

test("rollouts: the filter counts as it is written, and the rate rises with alpha", async () => {
  const fragment = settings({ ...QUESTION, view: "rollouts", alphas: "0,1", rollouts: 48 });
  page = await open(browser, gateway, { fragment });
  await run(page);
  await page.fill("#filter", "glimmercoin");
  await said(page, "Done: 96 completions");
  await page.waitForFunction(() => document.querySelector("#filter-note").textContent.includes("of 96"));
  const rows = await page.$$eval("#rates tbody tr", (found) =>
    found.map((row) => [...row.cells].map((cell) => cell.textContent)),
  );
  assert.deepEqual(
    rows.map((row) => row[2]),
    ["48", "48"],
  );
  assert.ok(Number(rows[1][1]) > Number(rows[0][1]) + 5, JSON.stringify(rows));
  const matching = await page.locator("#completions li.match").count();
  assert.equal(matching, Number(rows[1][1]));
  assert.ok((await page.evaluate(() => CSS.highlights.get("match").size)) >= matching);
  assert.equal(await page.locator("#chart .point").count(), 2);
  await shoot(page, "rollouts");

  await page.locator("#chart .point").first().click();
  await page.waitForFunction(() => document.querySelector("#chosen").textContent.startsWith("α = 0:"));
  assert.equal(await page.locator("#completions li").count(), 48);
});

test("a broken expression is a message, and one that never ends is given up", async () => {
  const fragment = settings({ ...QUESTION, view: "rollouts", alphas: "1", rollouts: 8, filterKind: "regex" });
  page = await open(browser, gateway, { fragment });
  await run(page);
  await said(page, "Done");
  await page.fill("#filter", "(");
  await page.waitForFunction(() => document.querySelector("#filter-note").textContent.includes("Unterminated group"));
  await page.fill("#filter", "(.*)*(.*)*(.*)*\\1\\2\\3~~");
  await page.waitForFunction(() => document.querySelector("#filter-note").textContent.includes("takes too long"));
  await page.fill("#filter", "\\brome\\b");
  await page.waitForFunction(() => / of 8 completions/.test(document.querySelector("#filter-note").textContent));
});

test("Escape and closing the page both free the server", async () => {
  const fragment = settings({ ...QUESTION, view: "rollouts", alphas: "0,1,2", rollouts: 1024 });
  page = await open(browser, gateway, { fragment });
  await page.keyboard.press("Control+Enter");
  await until(
    () => openRequests(gateway),
    (open) => open > 1,
    "open",
  );
  await page.keyboard.press("Escape");
  await said(page, "Cancelled");
  await until(
    () => openRequests(gateway),
    (open) => open === 0,
    "free after Escape",
  );

  await page.keyboard.press("Control+Enter");
  await until(
    () => openRequests(gateway),
    (open) => open > 1,
    "open",
  );
  const { faults } = page;
  await page.close();
  await until(
    () => openRequests(gateway),
    (open) => open === 0,
    "free after closing",
  );
  assert.deepEqual(faults, []);
  page = undefined;
});

test("everything can be done with the keyboard alone", async () => {
  page = await open(browser, gateway, { fragment: settings(QUESTION) });
  await page.keyboard.press("?");
  assert.ok(await page.locator("#help").isVisible());
  await page.keyboard.press("Escape");
  await page.keyboard.press("Control+Enter");
  await said(page, "Done");
  const isInAnswer = () => page.evaluate(() => document.activeElement.classList.contains("tokens"));
  for (let presses = 0; !(await isInAnswer()); presses++) {
    assert.ok(presses < 60, "Tab never reaches the answers");
    await page.keyboard.press("Tab");
  }
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  assert.match(await page.textContent("#inspector .facts"), /after, sequence 1, token 2/);
  await page.waitForSelector("#inspector.pinned tbody tr:nth-child(11)");
  const focused = () => page.evaluate(() => document.activeElement.className);
  for (let presses = 0; (await focused()) !== "fork"; presses++) {
    assert.ok(presses < 20, "Tab never reaches a fork");
    await page.keyboard.press("Tab");
  }
  await page.keyboard.press("Enter");
  await page.waitForSelector("#fork");
  await said(page, "Done");
  await page.keyboard.press("Alt+2");
  assert.ok(await page.locator("#rollouts").isVisible());
});

test("the code that the page gives runs, and says what the page shows", async () => {
  await compared({ alpha: 1, temperature: 1 });
  const amplified = (await page.locator(".cell.amplified .t:not(.special)").allTextContents()).join("");
  await page.click("#open-code");
  const curl = await codeIn("curl");
  const lines = (await exec("bash", ["-ec", curl])).stdout.split("\n").filter(Boolean).map(JSON.parse);
  const texts = lines.filter((line) => line.delta?.role === "MODEL_ROLE_AMPLIFIED").map((line) => line.delta.text);
  assert.equal(texts.join(""), amplified);

  const environment = { ...process.env, PYTHONPATH: join(ROOT, "clients/python") };
  const python = await exec(PYTHON, ["-c", await codeIn("python")], { env: environment });
  assert.ok(python.stdout.includes(`amplified: ${amplified}\n`), python.stdout);

  const typescript = await codeIn("typescript");
  if (existsSync(join(ROOT, "clients/typescript/dist/src/node.js"))) {
    assert.ok((await asModule(typescript)).includes(`AMPLIFIED ${amplified}\n`));
  }
  await shoot(page, "code");
});

test("the code of the rollouts runs too", async () => {
  const rollouts = { ...QUESTION, view: "rollouts", alphas: "0,1", rollouts: 2, stop: ["it's", "\n"] };
  page = await open(browser, gateway, { fragment: settings(rollouts) });
  await page.click("#open-code");
  const lines = (await exec("bash", ["-ec", await codeIn("curl")])).stdout.split("\n").filter(Boolean).map(JSON.parse);
  assert.equal(lines.filter((line) => line.finished).length, 4);
  const environment = { ...process.env, PYTHONPATH: join(ROOT, "clients/python") };
  const python = await exec(PYTHON, ["-c", await codeIn("python")], { env: environment });
  assert.equal(python.stdout.trim().split("\n").length, 4);
});

async function codeIn(language) {
  await page.check(`input[value=${language}]`, { force: true });
  return await page.textContent("#code-text");
}

/** Run code that imports the TypeScript client, which must be built. */
async function asModule(code) {
  const folder = await mkdtemp(join(tmpdir(), "snippet-"));
  try {
    await mkdir(join(folder, "node_modules/@lda"), { recursive: true });
    await symlink(join(ROOT, "clients/typescript"), join(folder, "node_modules/@lda/client"));
    await writeFile(join(folder, "snippet.mjs"), code);
    return (await exec(process.execPath, ["snippet.mjs"], { cwd: folder })).stdout;
  } finally {
    await rm(folder, { recursive: true });
  }
}

test("dark, as the system or the person likes it", async () => {
  await compared({ sequences: 2 }, { colorScheme: "dark" });
  const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const dark = await paper();
  await page.locator(".cell.amplified .t").nth(3).click();
  await page.waitForSelector("#inspector.pinned tbody tr:nth-child(11)");
  await shoot(page, "dark");
  await page.selectOption("#theme", "light");
  const light = await paper();
  assert.notEqual(light, dark);
  await page.reload();
  await page.waitForSelector("#health[data-kind=ready]");
  assert.equal(await paper(), light);
});

for (const view of ["compare", "rollouts"]) {
  test(`at 200% nothing scrolls sideways: ${view}`, async () => {
    const fragment = settings({ ...QUESTION, view, alphas: "0,0.5,1", rollouts: 4, filter: "the" });
    // 1280 pixels at 200%.
    page = await open(browser, gateway, { fragment, viewport: { width: 640, height: 400 }, deviceScaleFactor: 2 });
    await run(page);
    await said(page, "Done");
    if (view === "compare") await page.locator(".cell.amplified .t").first().click();
    const top = await page.$eval("#results", (results) => results.getBoundingClientRect().top);
    assert.ok(top < 400, "the results are out of sight");
    const [content, room] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
    assert.ok(content <= room, `${content} px in ${room}`);
    await shoot(page, `narrow_${view}`);
  });
}
