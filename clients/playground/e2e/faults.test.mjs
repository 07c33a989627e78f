// The page over the fake engine: a server that is full, loading, away or back, and one that is very fast.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtemp, open as openFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, test } from "node:test";
import { close, launch, open, run, said, settings, shoot } from "./browser.mjs";
import { fakeGateway, freePort, openRequests, until } from "./gateways.mjs";

const SLOW_FRAME_MS = 50;
const SLOW_SHARE_MAX = 0.05;

let browser, page, gateway;

before(async () => {
  browser = await launch();
});
afterEach(async () => {
  if (page) await close(page);
  await gateway?.stop();
  page = gateway = undefined;
});
after(async () => {
  await browser?.close();
});

const raw = (text, more = {}) => settings({ form: "text", text, seed: 1, ...more });

test("a full server says so, and when to come back", async () => {
  gateway = await fakeGateway();
  page = await open(browser, gateway, { fragment: raw("full") });
  await run(page);
  await page.waitForSelector("#problem:not([hidden])");
  assert.match(await page.textContent("#problem"), /The server is full/);
  assert.match(await page.textContent("#again"), /Run again in [12] s/);
  await page.waitForSelector("#again:not([disabled])");
});

test("closing the page while the server is silent cancels both calls", async () => {
  gateway = await fakeGateway();
  page = await open(browser, gateway, { fragment: raw("hold") });
  await run(page);
  await until(
    () => openRequests(gateway),
    (count) => count === 2,
    "two calls open",
  );
  await page.goto("about:blank");
  await until(
    () => openRequests(gateway),
    (count) => count === 0,
    "free",
  );
});

test("a server that dies is missed, and found when it is back, while it loads and after", async () => {
  const port = await freePort();
  const folder = await mkdtemp(join(tmpdir(), "gate-"));
  const gate = join(folder, "gate");
  execFileSync("mkfifo", [gate]);
  gateway = await fakeGateway({ port });
  page = await open(browser, gateway, { fragment: raw("hold") });
  await run(page);
  await until(
    () => openRequests(gateway),
    (count) => count === 2,
    "two calls open",
  );
  await gateway.stop("SIGKILL");
  await page.waitForSelector("#problem:not([hidden])");
  assert.match(await page.textContent("#problem"), /does not answer/);
  await page.waitForSelector("#health[data-kind=away]");
  await shoot(page, "away");

  gateway = await fakeGateway({ port, gate });
  await page.waitForSelector("#health[data-kind=loading]");
  const opened = await openFile(gate, "w");
  await opened.close();
  await page.waitForSelector("#health[data-kind=ready]");
  await said(page, "The server is back");
  assert.ok(await page.locator("#problem").isHidden());
  await page.click("label:has(#seed-locked)");
  await page.fill("#text", "hi");
  await run(page);
  await said(page, "Done");
  await rm(folder, { recursive: true });
});

test("a server that drains is said to take nothing new while it goes on with what runs", async () => {
  gateway = await fakeGateway({ drain_grace_s: 60 });
  page = await open(browser, gateway, { fragment: raw("hold") });
  await run(page);
  await until(
    () => openRequests(gateway),
    (count) => count === 2,
    "two calls open",
  );
  const stopped = gateway.stop();
  await page.waitForSelector("#health[data-kind=draining]");
  await page.keyboard.press("Escape");
  await said(page, "Cancelled");
  await stopped;
  await page.waitForSelector("#health[data-kind=away]");
});

/** Lengths of the frames while `act` runs, as the page itself sees them. */
async function frames(page, act) {
  await page.evaluate(() => {
    window.frameTimes = [];
    let before = performance.now();
    const frame = (now) => {
      window.frameTimes.push(now - before);
      before = now;
      window.frameRequest = requestAnimationFrame(frame);
    };
    window.frameRequest = requestAnimationFrame((now) => {
      before = now;
      window.frameRequest = requestAnimationFrame(frame);
    });
  });
  await act();
  return await page.evaluate(() => {
    cancelAnimationFrame(window.frameRequest);
    return window.frameTimes;
  });
}

function report(title, times) {
  const slow = times.filter((time) => time > SLOW_FRAME_MS).length / times.length;
  const longest = Math.max(...times).toFixed(0);
  console.log(
    `${title}: ${times.length} frames, ${(100 * slow).toFixed(1)}% over ${SLOW_FRAME_MS} ms, longest ${longest} ms`,
  );
  return slow;
}

// The fake engine as fast as it can, into text; and 30 tokens/s of each of 192 sequences, with their evidence.
const LOADS = [
  ["rollouts", raw("hi", { view: "rollouts", alphas: "1", rollouts: 64, filter: "xyz", maxNewTokens: 200 })],
  ["comparison", raw("clock", { sequences: 64, maxNewTokens: 200 })],
];
// Other programs make frames late too. What a page that does nothing loses is theirs; of the rest, the best try counts.
const TRIES = 3;
const IDLE_MS = 3000;

for (const [title, fragment] of LOADS) {
  test(`64 sequences of 200 tokens stream without the page stalling: ${title}`, async () => {
    gateway = await fakeGateway({ engine: { max_running_sequences: 256 } });
    page = await open(browser, gateway, { fragment });
    let excess = 1;
    for (let tries = 0; excess >= SLOW_SHARE_MAX && tries < TRIES; tries++) {
      const idle = report("nothing", await frames(page, () => page.waitForTimeout(IDLE_MS)));
      const busy = await frames(page, async () => {
        await run(page);
        await said(page, "Done");
      });
      excess = report(`64 x 200 tokens, ${title}`, busy) - idle;
    }
    assert.ok(excess < SLOW_SHARE_MAX);
    assert.deepEqual(page.faults, []);
  });
}
