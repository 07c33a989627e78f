// Keeping the page quick: work on the document once per frame, and reading in slices between frames.

const SLICE_MS = 5;

/** Call `draw` in the next frame that is `pauseMs` after the last, once however often this was called before. */
export function perFrame(draw: () => void, pauseMs = 0): () => void {
  let isDue = false;
  let notBefore = 0;
  const run = (now: number) => {
    if (now < notBefore) {
      requestAnimationFrame(run);
      return;
    }
    isDue = false;
    notBefore = now + pauseMs;
    draw();
  };
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(run);
  };
}

let sliceEndsAt = 0;

/** Let the page draw and answer, if this slice of time is used up: many streams would starve it otherwise. */
export async function breathe(): Promise<void> {
  if (performance.now() < sliceEndsAt) return;
  await new Promise<void>((resolve) => {
    waiting.push(resolve);
    channel.port2.postMessage(undefined);
  });
  sliceEndsAt = performance.now() + SLICE_MS;
}

const waiting: (() => void)[] = [];
// Unlike a timer, this is not held back to 4 ms when it recurs.
const channel = new MessageChannel();
channel.port1.onmessage = () => waiting.shift()?.();
