// Attention over a paged cache: the prompt's keys and values are read once for all rows that share it.
//
// A cache is [slots][kv_heads][dim], bfloat16 or float32. A row's context is its group's prefix (positions 0 to prefix,
// all visible) and its own positions behind it (visible up to the query's). Both run in blocks of 64 positions with one
// running maximum and sum (online softmax), always in rising order.

#define BLOCK 64
#define MAX_DIM 256
#define QUERY_TILE 96

typedef struct {
    long rows, queries;            // queries of each row, consecutive positions
    const int64_t *slot_map;       // [any row][context]: slot of each absolute position
    long context;
    const int64_t *row_index;      // [rows]: where a row stands in slot_map
    const int64_t *positions;      // [rows][queries]
    long groups;
    const int64_t *group_start;    // [groups + 1]: first row of each group
    const int64_t *group_prefix;   // [groups]: shared positions
    int prefix_as_tiles;           // 1: a block of keys is turned once for many queries; 0: dot products
    int own_as_tiles;
    long stored;                   // positions before this one are not written again
} Layout;

typedef struct {
    long heads, kv_heads, dim, window;  // window 0: all positions
    float scale, softcap;               // softcap 0: none
    const float *sinks;                 // [heads] or null
    int is_bf16;
} Shape;

typedef struct {
    const float *data;
    long row, head, query;  // strides
} Heads;

typedef struct {
    float queries[QUERY_TILE * MAX_DIM], out[QUERY_TILE * MAX_DIM];
    float turned_queries[QUERY_TILE * MAX_DIM];  // tiles of ROW_TILE, each [dim][queries]
    float keys[BLOCK * MAX_DIM], values[BLOCK * MAX_DIM], scores[ROW_TILE * BLOCK], turned_scores[ROW_TILE * BLOCK];
    float largest[QUERY_TILE], total[QUERY_TILE];
    int64_t position[QUERY_TILE];
} Work;

// Each thread's own, taken once and kept: clearing it anew for each layer would take longer than attention for one row.
static Work *work_of_thread(void) {
    static _Thread_local Work *work;
    if (!work) work = aligned_alloc(64, (sizeof(Work) + 63) / 64 * 64);
    return work;
}

static inline long padded(long dim) { return (dim + PANEL - 1) / PANEL * PANEL; }

static inline void widen_row(const Shape *s, const void *cache, int64_t slot, long head, float *out) {
    long at = (slot * s->kv_heads + head) * s->dim, d = 0;
    if (s->is_bf16)
        for (; d < s->dim; d++) out[d] = widen(((const bf16 *)cache)[at + d]);
    else
        memcpy(out, (const float *)cache + at, s->dim * sizeof(float));
    for (d = s->dim; d < padded(s->dim); d++) out[d] = 0;
}

// Keys as panels [positions / 16][dim][16], values as panels [dim / 16][positions][16].
static void load_block(const Shape *s, const void *keys, const void *values, const int64_t *slots, long count, long head,
                       Work *w) {
    long dim = padded(s->dim);
    float rows[PANEL][MAX_DIM], row[MAX_DIM];
    for (long j = 0; j < BLOCK; j += PANEL) {
        if (j >= count) break;
        for (long i = 0; i < PANEL; i++)
            if (j + i < count) widen_row(s, keys, slots[j + i], head, rows[i]);
            else memset(rows[i], 0, dim * sizeof(float));
        float *panel = w->keys + j * dim;
        for (long d = 0; d < dim; d++)
            for (long i = 0; i < PANEL; i++) panel[d * PANEL + i] = rows[i][d];
    }
    for (long j = 0; j < count; j++) {
        widen_row(s, values, slots[j], head, row);
        for (long d = 0; d < dim; d += PANEL) memcpy(w->values + d * BLOCK + j * PANEL, row + d, PANEL * sizeof(float));
    }
}

// Scores of one query over `count` positions from `first` become weights; returns the factor for what was summed before.
static float weigh(const Shape *s, float *scores, long count, long first, int64_t position, float *largest, float *total) {
    long width = (count + LANES - 1) / LANES * LANES, visible = at_most(count, position - first + 1);
    long hidden = s->window && position - s->window + 1 > first ? position - s->window + 1 - first : 0;
    for (long j = 0; j < width; j += LANES) {
        vec x = load_f32(scores + j) * splat(s->scale);
        store(scores + j, x);
    }
    if (s->softcap)
        for (long j = 0; j < count; j++) scores[j] = s->softcap * tanhf(scores[j] / s->softcap);
    for (long j = 0; j < at_most(hidden, width); j++) scores[j] = -INFINITY;
    for (long j = visible > 0 ? visible : 0; j < width; j++) scores[j] = -INFINITY;
    vec best = splat(*largest);
    for (long j = 0; j < width; j += LANES) best = larger(best, load_f32(scores + j));
    float now = largest_of(best);
    if (now == -INFINITY) {
        for (long j = 0; j < width; j++) scores[j] = 0;
        return 1;
    }
    vec sum = splat(0);
    for (long j = 0; j < width; j += LANES) {
        vec e = exp_of(load_f32(scores + j) - splat(now));
        store(scores + j, e);
        sum += e;
    }
    float factor = *largest == now ? 1 : *largest == -INFINITY ? 0 : expf(*largest - now);
    *total = *total * factor + sum_of(sum);
    *largest = now;
    return factor;
}

// Queries `from` to `to` of the work over one block of positions, a block of keys turned once for all of them.
static void block_as_tiles(const Shape *s, Work *w, long from, long to, long count, long first) {
    long dim = padded(s->dim);
    for (long q = from; q < to;) {
        long n = at_most(ROW_TILE, to - q);
        for (long j = 0; j < count; j += PANEL)
            NARROW_f32[n](w->turned_queries + q * dim, w->keys + j * dim, 0, dim, 0, w->scores + j, BLOCK);
        for (long i = 0; i < n; i++) {
            float *out = w->out + (q + i) * dim;
            float factor = weigh(s, w->scores + i * BLOCK, count, first, w->position[q + i], &w->largest[q + i],
                                 &w->total[q + i]);
            if (factor != 1)
                for (long d = 0; d < dim; d += LANES) store(out + d, load_f32(out + d) * splat(factor));
        }
        transpose_tile(w->scores, BLOCK, n, count, w->turned_scores);
        for (long d = 0; d < dim; d += PANEL)
            NARROW_f32[n](w->turned_scores, w->values + d * BLOCK, 0, count, 1, w->out + q * dim + d, dim);
        q += n;
    }
}

static inline vec load_part(const Shape *s, const void *cache, long at) {
    return s->is_bf16 ? load_bf16((const bf16 *)cache + at) : load_f32((const float *)cache + at);
}

// One query over one block of positions, keys and values straight from the cache; dim is a multiple of LANES.
static void block_as_dots(const Shape *s, Work *w, long q, const void *keys, const void *values, const int64_t *slots,
                          long count, long first, long head) {
    long dim = padded(s->dim);
    const float *query = w->queries + q * dim;
    for (long j = 0; j < count; j++) {
        long at = (slots[j] * s->kv_heads + head) * s->dim;
        vec sum = splat(0);
        for (long d = 0; d < s->dim; d += LANES) sum += load_f32(query + d) * load_part(s, keys, at + d);
        w->scores[j] = sum_of(sum);
    }
    for (long j = count; j < BLOCK; j++) w->scores[j] = 0;
    vec factor = splat(weigh(s, w->scores, count, first, w->position[q], &w->largest[q], &w->total[q]));
    vec out[MAX_DIM / LANES];
    for (long d = 0; d < s->dim; d += LANES) out[d / LANES] = load_f32(w->out + q * dim + d) * factor;
    for (long j = 0; j < count; j++) {
        long at = (slots[j] * s->kv_heads + head) * s->dim;
        vec weight = splat(w->scores[j]);
        for (long d = 0; d < s->dim; d += LANES) out[d / LANES] += weight * load_part(s, values, at + d);
    }
    for (long d = 0; d < s->dim; d += LANES) store(w->out + q * dim + d, out[d / LANES]);
}

// Positions `start` to `stop` of one slot row, for queries `from` to `to`.
static void over_positions(const Shape *s, Work *w, long from, long to, const void *keys, const void *values,
                           const int64_t *slots, long start, long stop, long head, int as_tiles) {
    long dim = padded(s->dim);
    int tiles = as_tiles || s->dim % LANES;
    if (tiles && start < stop)
        for (long q = from; q < to; q += ROW_TILE)
            transpose_tile(w->queries + q * dim, dim, at_most(ROW_TILE, to - q), dim, w->turned_queries + q * dim);
    for (long first = start; first < stop; first += BLOCK) {
        long count = at_most(BLOCK, stop - first);
        if (tiles) {
            load_block(s, keys, values, slots + first, count, head, w);
            block_as_tiles(s, w, from, to, count, first);
        } else
            for (long q = from; q < to; q++) block_as_dots(s, w, q, keys, values, slots + first, count, first, head);
    }
}

// Queries `from` to `to` (counted row by row, then query, then head of the kv head) of one group and one kv head.
static void attend_tile(const Layout *l, const Shape *s, const Heads *query, const void *keys, const void *values,
                        long group, long head, long from, long to, Work *w, float *out) {
    long shared = s->heads / s->kv_heads, per_row = l->queries * shared, dim = padded(s->dim);
    long first_row = l->group_start[group], prefix = l->group_prefix[group];
    for (long i = from; i < to; i++) {
        long row = first_row + i / per_row, q = i % per_row / shared, h = head * shared + i % shared;
        float *to_row = w->queries + (i - from) * dim;
        memcpy(to_row, query->data + row * query->row + h * query->head + q * query->query, s->dim * sizeof(float));
        for (long d = s->dim; d < dim; d++) to_row[d] = 0;
        w->position[i - from] = l->positions[row * l->queries + q];
        w->largest[i - from] = -INFINITY;
        w->total[i - from] = 0;
    }
    memset(w->out, 0, (to - from) * dim * sizeof(float));
    const int64_t *slots = l->slot_map + l->row_index[first_row] * l->context;
    over_positions(s, w, 0, to - from, keys, values, slots, 0, prefix, head, l->prefix_as_tiles);
    for (long i = from; i < to;) {
        long row = first_row + i / per_row, end = at_most(to, (i / per_row + 1) * per_row);
        slots = l->slot_map + l->row_index[row] * l->context;
        over_positions(s, w, i - from, end - from, keys, values, slots, prefix, w->position[end - 1 - from] + 1, head,
                       l->own_as_tiles);
        i = end;
    }
    for (long i = from; i < to; i++) {
        long row = first_row + i / per_row, q = i % per_row / shared, h = head * shared + i % shared;
        float total = w->total[i - from], largest = w->largest[i - from];
        if (s->sinks) {
            // The sink takes its share of the weight and adds no value.
            float most = s->sinks[h] > largest ? s->sinks[h] : largest;
            total = (total * expf(largest - most) + expf(s->sinks[h] - most)) / expf(largest - most);
        }
        float *to_row = out + ((row * l->queries + q) * s->heads + h) * s->dim;
        for (long d = 0; d < s->dim; d++) to_row[d] = w->out[(i - from) * dim + d] / total;
    }
}

static void store_row(const Shape *s, const float *from, void *cache, int64_t slot, long head) {
    long at = (slot * s->kv_heads + head) * s->dim;
    if (s->is_bf16)
        for (long d = 0; d < s->dim; d++) ((bf16 *)cache)[at + d] = narrow(from[d]);
    else
        memcpy((float *)cache + at, from, s->dim * sizeof(float));
}

static void store_new(const Layout *l, const Shape *s, const Heads *key, const Heads *value, void *keys, void *values) {
#pragma omp for schedule(static)
    for (long i = 0; i < l->rows * l->queries; i++) {
        long row = i / l->queries, q = i % l->queries;
        if (l->positions[i] < l->stored) continue;
        int64_t slot = l->slot_map[l->row_index[row] * l->context + l->positions[i]];
        for (long h = 0; h < s->kv_heads; h++) {
            store_row(s, key->data + row * key->row + h * key->head + q * key->query, keys, slot, h);
            store_row(s, value->data + row * value->row + h * value->head + q * value->query, values, slot, h);
        }
    }
}

// How the queries of a pass are cut into pieces of work: one for each group, kv head and tile of queries.
typedef struct {
    long per_head, tiles, items;
} Cut;

static Cut cut_of(const Layout *l, const Shape *s) {
    Cut cut = {.per_head = l->queries * (s->heads / s->kv_heads)};
    long most = 0;
    for (long g = 0; g < l->groups; g++) {
        long count = (l->group_start[g + 1] - l->group_start[g]) * cut.per_head;
        most = count > most ? count : most;
    }
    cut.tiles = (most + QUERY_TILE - 1) / QUERY_TILE;
    cut.items = l->groups * s->kv_heads * cut.tiles;
    return cut;
}

// Store the new keys and values, then attend, by all threads of a parallel region. out is [rows][queries][heads][dim].
// 1 in a thread that found no memory.
static int attend(const Layout *l, const Shape *s, const Cut *cut, const Heads *query, const Heads *key,
                  const Heads *value, void *keys, void *values, float *out) {
    store_new(l, s, key, value, keys, values);
    Work *w = work_of_thread();
#pragma omp for schedule(dynamic)
    for (long item = 0; item < cut->items; item++) {
        long group = item / (s->kv_heads * cut->tiles), head = item / cut->tiles % s->kv_heads;
        long from = item % cut->tiles * QUERY_TILE;
        long count = (l->group_start[group + 1] - l->group_start[group]) * cut->per_head;
        if (w && from < count)
            attend_tile(l, s, query, keys, values, group, head, from, at_most(count, from + QUERY_TILE), w, out);
    }
    return !w;
}

// 0, or 1 when memory ran out.
int lda_attend(const Layout *l, const Shape *s, const Heads *query, const Heads *key, const Heads *value, void *keys,
               void *values, float *out) {
    Cut cut = cut_of(l, s);
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (cut.items > 1 && l->rows * l->queries * s->heads * s->dim > 4096)
    failed = attend(l, s, &cut, query, key, value, keys, values, out);
    return failed;
}
