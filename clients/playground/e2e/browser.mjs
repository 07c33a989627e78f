// Chromium with the page in it, and what the tests do there again and again.
import { mkdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const ARTEFACTS = fileURLToPath(new URL("./artefacts", import.meta.url));
const ARGUMENTS = [
  "--no-sandbox",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
];
export const WAIT_MS = 60_000;

export async function launch() {
  mkdirSync(ARTEFACTS, { recursive: true });
  return await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGUMENTS });
}

/** The page of a gateway, ready; a fault of the page fails the test that looks at `faults`. */
export async function open(browser, { url }, { fragment = "", ready = true, ...context } = {}) {
  const options = { viewport: { width: 1440, height: 900 }, ...context };
  const page = await (await browser.newContext(options)).newPage();
  page.setDefaultTimeout(WAIT_MS);
  page.faults = [];
  page.on("pageerror", (error) => page.faults.push(error.stack));
  page.on("console", (message) => {
    // What the browser itself says of a connection that broke is no fault of the page.
    const isFault = message.type() === "error" && !message.text().startsWith("Failed to load resource");
    if (isFault) page.faults.push(message.text());
  });
  await page.goto(`${url}/${fragment}`);
  if (ready) await page.waitForSelector("#health[data-kind=ready]");
  return page;
}

export async function close(page) {
  await page.context().close();
}

/** A fragment that sets these. */
export function settings(values) {
  const written = Object.entries(values).map(([key, value]) => [
    key,
    typeof value === "object" ? JSON.stringify(value) : String(value),
  ]);
  return `#${new URLSearchParams({ v: "1", ...Object.fromEntries(written) })}`;
}

export async function run(page) {
  await page.click("#run");
}

/** Wait until the status line begins so. */
export async function said(page, words) {
  await page.waitForFunction((begin) => document.querySelector("#status").textContent.startsWith(begin), words);
  // What has arrived is on the page some frames later.
  await page.waitForFunction(() => !document.querySelector(".cell.open"));
  return await page.textContent("#status");
}

/** The token texts of one column of a sequence. */
export async function tokensOf(page, column, sequence = 0) {
  return await page.locator(`.row >> nth=${sequence} >> .cell.${column} .t`).allTextContents();
}

export async function shoot(page, name) {
  await page.screenshot({ path: `${ARTEFACTS}/${name}.png` });
}
