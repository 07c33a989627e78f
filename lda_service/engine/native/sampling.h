// Amplify, filter and draw, row by row: two passes over the logits, three with filters, and no sort of the vocabulary.
//
// The law and the noise are those of `sampling.py`: argmax(z / T + g) with g = -log(-log u), u hashed from (key, position,
// token). A token can win only if its noise is large enough, and -log u >= 1 - u bounds that without a logarithm.

#define BINS 2048
#define BINS_PER_NAT 64
#define FINE_BINS 256
#define CHUNK 64
#define GOLDEN 0x9E3779B97F4A7C15u

typedef struct {
    long rows, vocabulary, stride;
    const float *after, *before;   // [rows][stride]
    const float *mask;             // [vocabulary]: 0, or -inf for ids that may never be drawn; or null
    const float *alpha, *temperature, *top_p, *min_p, *plausibility;  // [rows]
    const int64_t *top_k;          // [rows], 0: all
    const uint64_t *keys, *positions;  // [rows]: of the sequence, and of the token to draw
    const uint64_t *token_noise;   // [vocabulary]: hash of the token
    float *scratch;                // [rows][vocabulary]
    int64_t *tokens;               // [rows]
    float *logprobs;               // [rows], NaN for greedy rows
    uint8_t *sound;                // [rows]: 0 if a logit is NaN or infinite
} Draw;

static int falling(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// The slow way, for rows in which a model rules ids out: see `amplify.py` for the rules.
static void amplify_ruled(const Draw *d, long row, float *z) {
    const float *a = d->after + row * d->stride, *b = d->before + row * d->stride;
    float alpha = d->alpha[row], lowest = INFINITY;
    for (long i = 0; i < d->vocabulary; i++)
        if (b[i] > -INFINITY && b[i] < lowest && !(d->mask && d->mask[i])) lowest = b[i];
    for (long i = 0; i < d->vocabulary; i++) {
        float other = b[i] == -INFINITY ? lowest : b[i];
        if (a[i] == -INFINITY || (d->mask && d->mask[i])) z[i] = -INFINITY;
        else z[i] = alpha == -1 ? other : a[i] + alpha * (a[i] - other);
    }
}

// Fills z; returns its largest entry, or NaN where an entry is NaN.
static float amplify_row(const Draw *d, long row, float *z) {
    const float *a = d->after + row * d->stride, *b = d->before + row * d->stride;
    float alpha = d->alpha[row];
    long i = 0, n = d->vocabulary;
    vec lowest = splat(INFINITY);
    for (; i + LANES <= n; i += LANES) {
        vec x = load_f32(a + i), y = load_f32(b + i);
        vec least = where(x < y, x, y);
        lowest = where(least < lowest, least, lowest);
        vec out = alpha == -1 ? y : x + splat(alpha) * (x - y);
        store(z + i, d->mask ? out + load_f32(d->mask + i) : out);
    }
    float least = -largest_of(-lowest);
    for (; i < n; i++) {
        least = a[i] < least ? a[i] : least;
        least = b[i] < least ? b[i] : least;
        z[i] = (alpha == -1 ? b[i] : a[i] + alpha * (a[i] - b[i])) + (d->mask ? d->mask[i] : 0);
    }
    if (least == -INFINITY) amplify_ruled(d, row, z);
    float best = -INFINITY;
    int broken = 0;
    for (i = 0; i < n; i++) {
        best = z[i] > best ? z[i] : best;
        broken |= z[i] != z[i];
    }
    return broken ? NAN : best;
}

static void drop_implausible(const Draw *d, long row, float *z) {
    const float *a = d->after + row * d->stride;
    float best = -INFINITY;
    for (long i = 0; i < d->vocabulary; i++)
        if (!(d->mask && d->mask[i]) && a[i] > best) best = a[i];
    float floor = best + logf(d->plausibility[row]);
    for (long i = 0; i < d->vocabulary; i++)
        if (a[i] < floor) z[i] = -INFINITY;
}

typedef struct {
    long count[BINS];
    double mass[2][BINS];  // of even and odd entries: neighbours often share a bin, and would wait for each other's sum
    float *weight;         // [vocabulary]: e^s
    int32_t *bin;          // [vocabulary]
    float *sorted;         // [vocabulary]: values of one bin
} Histogram;

static inline int bin_of(float s) { return s > -(float)(BINS - 1) / BINS_PER_NAT ? (int)(-s * BINS_PER_NAT) : BINS - 1; }

// Every value's weight and bin.
static void sort_into_bins(const float *s, long n, Histogram *h) {
    const vec floor = splat(-(float)(BINS - 1) / BINS_PER_NAT);
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        vec v = load_f32(s + i);
        ivec bin = __builtin_convertvector(where(v > floor, v, floor) * splat(-BINS_PER_NAT), ivec);
        store(h->weight + i, exp_of(v));
        memcpy(h->bin + i, &bin, sizeof bin);
    }
    for (; i < n; i++) {
        h->weight[i] = expf(s[i]);
        h->bin[i] = bin_of(s[i]);
    }
}

static long values_of_bin(const float *s, long n, int bin, float floor, Histogram *h) {
    long count = 0;
    for (long i = 0; i < n; i++) {
        h->sorted[count] = s[i];
        count += h->bin[i] == bin && s[i] >= floor && s[i] > -INFINITY;
    }
    return count;
}

static inline int fine_bin_of(float s, int bin) {
    int fine = (int)((-s * BINS_PER_NAT - (float)bin) * FINE_BINS);
    return fine < 0 ? 0 : fine < FINE_BINS ? fine : FINE_BINS - 1;
}

// Of `count` values of one bin, the one at which the mass from the largest down reaches `target`; the smallest of all if
// rounding leaves it short of that. A second, finer histogram leaves only a few to sort.
static float crossing(float *values, long count, int bin, double target) {
    double mass[FINE_BINS] = {0}, sum = 0;
    int fine = 0, last = 0;
    for (long i = 0; i < count; i++) {
        int at = fine_bin_of(values[i], bin);
        mass[at] += expf(values[i]);
        last = at > last ? at : last;
    }
    for (; fine < last && sum + mass[fine] < target; fine++) sum += mass[fine];
    long few = 0, i = 0;
    for (long j = 0; j < count; j++)
        if (fine_bin_of(values[j], bin) == fine) values[few++] = values[j];
    qsort(values, few, sizeof(float), falling);
    for (; i < few; i++)
        if ((sum += expf(values[i])) >= target) break;
    return values[i < few ? i : few - 1];
}

// The smallest value that passes top_k, and the mass of those that do.
static float top_k_threshold(long top_k, const float *s, long n, Histogram *h, double *total) {
    long finite = 0, before = 0;
    int bin = 0;
    memset(h->count, 0, sizeof h->count);
    for (long i = 0; i < n; i++)
        if (s[i] > -INFINITY) {
            h->count[h->bin[i]]++;
            finite++;
        }
    if (top_k >= finite) return -INFINITY;
    *total = 0;
    for (; before + h->count[bin] < top_k; bin++) {
        before += h->count[bin];
        *total += h->mass[0][bin] + h->mass[1][bin];
    }
    long count = values_of_bin(s, n, bin, -INFINITY, h);
    qsort(h->sorted, count, sizeof(float), falling);
    float threshold = h->sorted[top_k - before - 1];
    for (long i = 0; i < count && h->sorted[i] >= threshold; i++) *total += expf(h->sorted[i]);
    return threshold;
}

// The smallest value that passes top_k, top_p and min_p; ties with it pass too.
static float threshold_of(const Draw *d, long row, const float *s, long n, Histogram *h) {
    double total = 0, sum = 0;
    float by_count = -INFINITY, by_mass = -INFINITY;
    sort_into_bins(s, n, h);
    memset(h->mass, 0, sizeof h->mass);
    for (long i = 0; i < n; i++) h->mass[i & 1][h->bin[i]] += h->weight[i];
    for (int bin = 0; bin < BINS; bin++) total += h->mass[0][bin] + h->mass[1][bin];
    if (d->top_k[row] > 0) by_count = top_k_threshold(d->top_k[row], s, n, h, &total);
    if (d->top_p[row] < 1) {
        double target = d->top_p[row] * total, mass;
        int bin = 0;
        for (; bin < BINS - 1 && sum + (mass = h->mass[0][bin] + h->mass[1][bin]) < target; bin++) sum += mass;
        long count = values_of_bin(s, n, bin, by_count, h);
        if (count) by_mass = crossing(h->sorted, count, bin, target - sum);
    }
    float by_ratio = d->min_p[row] > 0 ? logf(d->min_p[row]) : -INFINITY;
    float best = by_count > by_mass ? by_count : by_mass;
    return best > by_ratio ? best : by_ratio;
}

static inline uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z += GOLDEN;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static inline float gumbel(uint64_t bits) {
    double u = ((double)(bits >> 11) + 0.5) * 0x1p-53;
    return (float)-log(-log(u));
}

// Draw from softmax(s) over s >= threshold; the largest s is 0. Sets the log-probability of what is drawn.
static long race(const float *s, long n, float threshold, uint64_t noise, const uint64_t *token_noise, float *logprob) {
    float best = -INFINITY, bar = 0;
    double total = 0;
    long winner = 0;
    for (long start = 0; start < n; start += CHUNK) {
        long count = at_most(CHUNK, n - start);
        uint64_t bits[CHUNK];
        float weight[CHUNK], least[CHUNK], sum = 0;
        int candidates = 0;
        for (long i = 0; i < count; i++) bits[i] = mix(noise ^ token_noise[start + i]);
        for (long i = 0; i < CHUNK; i++) weight[i] = i < count && s[start + i] >= threshold ? s[start + i] : -INFINITY;
        for (long i = 0; i < CHUNK; i += LANES) store(weight + i, exp_of(load_f32(weight + i)));
        for (long i = 0; i < count; i++) {
            least[i] = (float)(int32_t)(0xffffff - (bits[i] >> 40)) * 0x1p-24f;  // <= 1 - u
            candidates |= (weight[i] > 0) & (least[i] * bar <= weight[i]);  // without a branch: it would be a coin flip
        }
        for (long i = 0; i < count; i++) sum += weight[i];
        total += sum;
        if (!candidates) continue;
        for (long i = 0; i < count; i++) {
            if (s[start + i] < threshold || least[i] * bar > weight[i]) continue;
            float score = s[start + i] + gumbel(bits[i]);
            if (score > best) {
                best = score;
                bar = expf(best) * 0.999f;  // leaves room for rounding
                winner = start + i;
            }
        }
    }
    *logprob = s[winner] - (float)log(total);
    return winner;
}

static void draw_row(const Draw *d, long row, Histogram *h) {
    float *s = d->scratch + row * d->vocabulary, temperature = d->temperature[row];
    float largest = amplify_row(d, row, s);
    d->sound[row] = largest - largest == 0;
    d->tokens[row] = 0;
    d->logprobs[row] = NAN;
    if (!d->sound[row]) return;
    if (d->plausibility[row] > 0) {
        drop_implausible(d, row, s);
        largest = -INFINITY;
        for (long i = 0; i < d->vocabulary; i++) largest = s[i] > largest ? s[i] : largest;
    }
    if (temperature == 0) {
        while (s[d->tokens[row]] != largest) d->tokens[row]++;
        return;
    }
    // Relative to the largest, so that no temperature, however small, makes inf - inf of them.
    for (long i = 0; i < d->vocabulary; i++) s[i] = (s[i] - largest) / temperature;
    float threshold = -FLT_MAX;
    if (d->top_k[row] > 0 || d->top_p[row] < 1 || d->min_p[row] > 0)
        threshold = threshold_of(d, row, s, d->vocabulary, h);
    if (threshold < -FLT_MAX) threshold = -FLT_MAX;
    uint64_t noise = mix(d->keys[row] + d->positions[row] * GOLDEN);
    d->tokens[row] = race(s, d->vocabulary, threshold, noise, d->token_noise, &d->logprobs[row]);
}

// 0, or 1 when memory ran out.
int lda_sample(const Draw *d) {
    int failed = 0;
#pragma omp parallel if (d->rows * d->vocabulary > 16384)
    {
        Histogram *h = malloc(sizeof *h);
        float *space = malloc(3 * d->vocabulary * sizeof(float));
        if (!space || !h) failed = 1;
        else *h = (Histogram){.weight = space, .bin = (int32_t *)(space + d->vocabulary), .sorted = space + 2 * d->vocabulary};
#pragma omp for schedule(dynamic)
        for (long row = 0; row < d->rows; row++)
            if (space && h) draw_row(d, row, h);
        free(space);
        free(h);
    }
    return failed;
}
