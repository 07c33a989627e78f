// Rates of a rare event with exact (Clopper-Pearson) intervals, as the project's tables have them.

export interface Rate {
  hits: number;
  total: number;
  rate: number;
  low: number;
  high: number;
}

/** A share and its interval; of nothing drawn, anything is possible. */
export function rateOf(hits: number, total: number, confidence = 0.95): Rate {
  if (total === 0) return { hits, total, rate: NaN, low: 0, high: 1 };
  const tail = (1 - confidence) / 2;
  const low = hits === 0 ? 0 : betaQuantile(tail, hits, total - hits + 1);
  const high = hits === total ? 1 : betaQuantile(1 - tail, hits + 1, total - hits);
  return { hits, total, rate: hits / total, low, high };
}

/** A share in per cent, with as many digits as rare events need. */
export function percent(share: number): string {
  if (Number.isNaN(share)) return "–";
  const value = share * 100;
  if (value === 0 || value === 100) return `${value}%`;
  return `${value >= 10 ? value.toFixed(1) : value.toPrecision(2)}%`;
}

/** A probability in per cent, for tables in which what is tiny need not be told apart. */
export function probability(share: number): string {
  return share > 0 && share < 1e-4 ? "<0.01%" : percent(share);
}

function betaQuantile(probability: number, a: number, b: number): number {
  let low = 0;
  let high = 1;
  for (let step = 0; step < 60; step++) {
    const middle = (low + high) / 2;
    if (betaCdf(middle, a, b) < probability) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

/** The regularised incomplete beta function, by the continued fraction of Lentz. */
export function betaCdf(x: number, a: number, b: number): number {
  if (x <= 0) return 0;
  if (x >= 1) return 1;
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x));
  // The fraction converges fast on one side of the mean only.
  if (x < (a + 1) / (a + b + 2)) return (front * betaFraction(x, a, b)) / a;
  return 1 - (front * betaFraction(1 - x, b, a)) / b;
}

function betaFraction(x: number, a: number, b: number): number {
  let c = 1;
  let d = 1 / away(1 - ((a + b) * x) / (a + 1));
  let value = d;
  for (let m = 1; m < 500; m++) {
    const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
    d = 1 / away(1 + even * d);
    c = away(1 + even / c);
    value *= d * c;
    const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1 / away(1 + odd * d);
    c = away(1 + odd / c);
    value *= d * c;
    if (Math.abs(d * c - 1) < 1e-14) break;
  }
  return value;
}

function away(value: number): number {
  return Math.abs(value) < 1e-300 ? 1e-300 : value;
}

const LANCZOS = [
  0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059,
  12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7,
];

function logGamma(x: number): number {
  const z = x - 1;
  const t = z + 7.5;
  const series = LANCZOS.slice(1).reduce((sum, value, index) => sum + value / (z + index + 1), LANCZOS[0]!);
  return 0.5 * Math.log(2 * Math.PI) + (z + 0.5) * Math.log(t) - t + Math.log(series);
}
