// Stops of the alpha slider: fine where most of the looking is done, coarse where only early training needs it.

export const ALPHA_MIN = -1;
export const ALPHA_MAX = 20;

/** Where marks stand under the slider. */
export const MARKS: readonly number[] = [-1, 0, 1, 2, 5, 20];

const STRETCHES: readonly { to: number; steps: number }[] = [
  { to: 2, steps: 300 },
  { to: 5, steps: 60 },
  { to: 20, steps: 60 },
];

const STOPS = makeStops();

export const LAST_STOP = STOPS.length - 1;

/** The alpha at a stop of the slider. */
export function alphaAt(stop: number): number {
  return STOPS[Math.min(Math.max(Math.round(stop), 0), LAST_STOP)]!;
}

/** The stop that lies nearest to an alpha, which need not be on one. */
export function stopOf(alpha: number): number {
  let nearest = 0;
  for (let stop = 1; stop <= LAST_STOP; stop++) {
    if (Math.abs(STOPS[stop]! - alpha) < Math.abs(STOPS[nearest]! - alpha)) nearest = stop;
  }
  return nearest;
}

function makeStops(): number[] {
  const stops = [ALPHA_MIN];
  let from = ALPHA_MIN;
  for (const { to, steps } of STRETCHES) {
    for (let step = 1; step <= steps; step++) stops.push(rounded(from + ((to - from) * step) / steps));
    from = to;
  }
  return stops;
}

function rounded(value: number): number {
  return Math.round(value * 100) / 100;
}
