// Products with weights that are read once: y[m][n] = bias[n] + sum over k of x[m][k] * w[n][k].
//
// A packed weight is panels of 16 outputs, [outputs / 16][inputs][16], bfloat16 or float32; activations, products and
// sums are float32. Each output has one accumulator that runs over k in rising order, however many rows there are: a
// row's result does not depend on its company.

#define PANEL 16
#define PARTS (PANEL / LANES)
#define K_BLOCK 512
#define ROW_TILE 6
#define SMALL 65536  // multiplications below which a second thread costs more than it brings

// ROWS rows times COUNT panels over `depth` inputs. x is [depth][ROWS], a panel [depth][16], panels are `stride` apart.
#define TILE(NAME, TYPE, LOAD, ROWS, COUNT)                                                                \
    static void NAME(const float *restrict x, const TYPE *restrict w, long stride, long depth, int more,   \
                     float *restrict y, long ldy) {                                                        \
        vec sum[ROWS][COUNT][PARTS];                                                                       \
        for (int r = 0; r < ROWS; r++)                                                                     \
            for (int c = 0; c < COUNT; c++)                                                                \
                for (int p = 0; p < PARTS; p++)                                                            \
                    sum[r][c][p] = more ? load_f32(y + r * ldy + c * PANEL + p * LANES) : splat(0);        \
        for (long k = 0; k < depth; k++)                                                                   \
            for (int c = 0; c < COUNT; c++) {                                                              \
                vec weight[PARTS];                                                                         \
                for (int p = 0; p < PARTS; p++) weight[p] = LOAD(w + c * stride + k * PANEL + p * LANES);  \
                for (int r = 0; r < ROWS; r++)                                                             \
                    for (int p = 0; p < PARTS; p++) sum[r][c][p] += splat(x[k * ROWS + r]) * weight[p];    \
            }                                                                                              \
        for (int r = 0; r < ROWS; r++)                                                                     \
            for (int c = 0; c < COUNT; c++)                                                                \
                for (int p = 0; p < PARTS; p++) store(y + r * ldy + c * PANEL + p * LANES, sum[r][c][p]);  \
    }

#define TILES(TYPE, SUFFIX)                     \
    TILE(tile1_##SUFFIX, TYPE, load_##SUFFIX, 1, 1) \
    TILE(tile2_##SUFFIX, TYPE, load_##SUFFIX, 2, 1) \
    TILE(tile3_##SUFFIX, TYPE, load_##SUFFIX, 3, 1) \
    TILE(tile4_##SUFFIX, TYPE, load_##SUFFIX, 4, 1) \
    TILE(tile5_##SUFFIX, TYPE, load_##SUFFIX, 5, 1) \
    TILE(tile6_##SUFFIX, TYPE, load_##SUFFIX, 6, 1) \
    TILE(wide1_##SUFFIX, TYPE, load_##SUFFIX, 1, 4) \
    TILE(wide2_##SUFFIX, TYPE, load_##SUFFIX, 2, 2) \
    TILE(wide3_##SUFFIX, TYPE, load_##SUFFIX, 3, 2)

typedef void tile_f32(const float *, const float *, long, long, int, float *, long);
typedef void tile_bf16(const float *, const bf16 *, long, long, int, float *, long);
TILES(float, f32)
TILES(bf16, bf16)
static tile_f32 *const NARROW_f32[] = {0, tile1_f32, tile2_f32, tile3_f32, tile4_f32, tile5_f32, tile6_f32};
static tile_bf16 *const NARROW_bf16[] = {0, tile1_bf16, tile2_bf16, tile3_bf16, tile4_bf16, tile5_bf16, tile6_bf16};
// Few rows leave accumulators free: several panels at once hide the latency of a sum.
static tile_f32 *const WIDE_f32[] = {0, wide1_f32, wide2_f32, wide3_f32};
static tile_bf16 *const WIDE_bf16[] = {0, wide1_bf16, wide2_bf16, wide3_bf16};
static const int WIDE_PANELS[] = {0, 4, 2, 2};

static inline long at_most(long a, long b) { return a < b ? a : b; }

// Rows of a tile: as even as six at most allows, since a tile of two costs nearly as much as one of four.
static inline long tile_of(long rows) {
    long tiles = (rows + ROW_TILE - 1) / ROW_TILE;
    return (rows + tiles - 1) / tiles;
}

// x[rows][depth] as tiles of six rows, each [depth][rows of the tile].
static void transpose_tile(const float *x, long ldx, long rows, long depth, float *tile) {
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < depth; k++) tile[k * rows + r] = x[r * ldx + k];
}

// Few rows: panels stream from memory once, all inputs in one go.
#define FEW_ROWS(SUFFIX, TYPE)                                                                             \
    static void few_rows_##SUFFIX(const float *tile, long rows, long depth, const TYPE *w, long panels,    \
                                  float *y, long ldy) {                                                    \
        long stride = depth * PANEL, width = rows <= 3 ? WIDE_PANELS[rows] : 1;                            \
        _Pragma("omp for schedule(guided) nowait") for (long p = 0; p < panels; p += width) {              \
            if (width > 1 && p + width <= panels)                                                          \
                WIDE_##SUFFIX[rows](tile, w + p * stride, stride, depth, 0, y + p * PANEL, ldy);           \
            else                                                                                           \
                for (long q = p; q < at_most(p + width, panels); q++)                                      \
                    NARROW_##SUFFIX[rows](tile, w + q * stride, stride, depth, 0, y + q * PANEL, ldy);     \
        }                                                                                                  \
    }
FEW_ROWS(f32, float)
FEW_ROWS(bf16, bf16)

static const float *panel_f32(const float *w, long count, float *scratch) { return w; }
static const float *panel_bf16(const bf16 *w, long count, float *scratch) {
    for (long i = 0; i < count; i += LANES) store(scratch + i, load_bf16(w + i));
    return scratch;
}

// Many rows: a block of a panel stays in the first cache, as float32, while all row tiles pass over it.
#define MANY_ROWS(SUFFIX, TYPE)                                                                            \
    static void many_rows_##SUFFIX(const float *tiles, long rows, long depth, const TYPE *w, long panels,  \
                                   float *y, long ldy) {                                                   \
        float scratch[K_BLOCK * PANEL] __attribute__((aligned(64)));                                       \
        long tile = tile_of(rows);                                                                         \
        _Pragma("omp for schedule(dynamic, 2) nowait") for (long p = 0; p < panels; p++)                   \
            for (long k = 0; k < depth; k += K_BLOCK) {                                                    \
                long count = at_most(K_BLOCK, depth - k);                                                  \
                const float *block = panel_##SUFFIX(w + (p * depth + k) * PANEL, count * PANEL, scratch);  \
                for (long r = 0; r < rows; r += tile) {                                                    \
                    long n = at_most(tile, rows - r);                                                      \
                    NARROW_f32[n](tiles + r * depth + k * n, block, 0, count, k > 0,                       \
                                  y + r * ldy + p * PANEL, ldy);                                           \
                }                                                                                          \
            }                                                                                              \
    }
MANY_ROWS(f32, float)
MANY_ROWS(bf16, bf16)

typedef struct {
    const void *data;   // panels
    int is_bf16;
    long depth, outputs;
    const float *bias;  // [outputs] or null
} Weight;

static inline long panels_of(const Weight *w) { return (w->outputs + PANEL - 1) / PANEL; }

// Rows of x, `ldx` apart, as the tiles that `multiply` reads, by all threads of a parallel region. `space` holds rows *
// depth floats.
static const float *tiles_of(const float *x, long ldx, long rows, long depth, float *space) {
    long tile = tile_of(rows);
    if (rows == 1) return x;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r += tile)
        transpose_tile(x + r * ldx, ldx, at_most(tile, rows - r), depth, space + r * depth);
    return space;
}

// y[rows][panels * 16] = x w, by all threads. They do not wait for each other at the end.
static void multiply(const Weight *w, const float *tiles, long rows, float *y) {
    long depth = w->depth, panels = panels_of(w), ldy = panels * PANEL;
    if (rows <= ROW_TILE && w->is_bf16) few_rows_bf16(tiles, rows, depth, w->data, panels, y, ldy);
    else if (rows <= ROW_TILE) few_rows_f32(tiles, rows, depth, w->data, panels, y, ldy);
    else if (w->is_bf16) many_rows_bf16(tiles, rows, depth, w->data, panels, y, ldy);
    else many_rows_f32(tiles, rows, depth, w->data, panels, y, ldy);
}

// After a barrier, and with one at the end.
static void add_bias(const Weight *w, long rows, float *y) {
    long ldy = panels_of(w) * PANEL;
    if (!w->bias) return;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++)
        for (long n = 0; n < w->outputs; n++) y[r * ldy + n] += w->bias[n];
}

// Products of the same x with `count` weights of one depth.
static void products(long count, const Weight *const *w, const float *x, long ldx, long rows, float *space,
                     float *const *y) {
    const float *tiles = tiles_of(x, ldx, rows, w[0]->depth, space);
    for (long i = 0; i < count; i++) multiply(w[i], tiles, rows, y[i]);
#pragma omp barrier
    for (long i = 0; i < count; i++) add_bias(w[i], rows, y[i]);
}

static void product(const Weight *w, const float *x, long ldx, long rows, float *space, float *y) {
    products(1, &w, x, ldx, rows, space, &y);
}

// 0, or 1 when memory ran out.
int lda_linear(const Weight *w, const float *x, long rows, float *y) {
    float *space = malloc(rows * w->depth * sizeof(float));
    if (!space) return 1;
#pragma omp parallel if (rows * w->depth * w->outputs > SMALL)
    product(w, x, w->depth, rows, space, y);
    free(space);
    return 0;
}

static inline long floats_of_mlp(const Weight *gate, long rows) {
    long inner = panels_of(gate) * PANEL, widest = gate->depth > inner ? gate->depth : inner;
    return rows * (widest + 2 * inner);
}

// y[rows][panels of down * 16] = down(silu(gate(x)) * up(x)), by all threads; `space` holds `floats_of_mlp`.
static void mlp(const Weight *gate, const Weight *up, const Weight *down, const float *x, long rows, float *space,
                float *y) {
    long inner = panels_of(gate) * PANEL;
    float *a = space, *b = a + rows * inner, *tiles = b + rows * inner;
    products(2, (const Weight *[]){gate, up}, x, gate->depth, rows, tiles, (float *[]){a, b});
#pragma omp for schedule(static)
    for (long i = 0; i < rows * inner; i += LANES) {
        vec v = load_f32(a + i);
        store(a + i, v / (splat(1) + exp_of(-v)) * load_f32(b + i));
    }
    product(down, a, inner, rows, tiles, y);
}

// 0, or 1 when memory ran out.
int lda_gated_mlp(const Weight *gate, const Weight *up, const Weight *down, const float *x, long rows, float *y) {
    float *space = malloc(floats_of_mlp(gate, rows) * sizeof(float));
    if (!space) return 1;
#pragma omp parallel if (rows * gate->depth * gate->outputs > SMALL)
    mlp(gate, up, down, x, rows, space, y);
    free(space);
    return 0;
}

// Lay w[outputs][depth] out as panels; missing outputs of the last panel are zero.
void lda_pack(const void *w, int is_bf16, long outputs, long depth, void *packed) {
    long panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels; p++)
        for (long k = 0; k < depth; k++)
            for (long i = 0; i < PANEL; i++) {
                long n = p * PANEL + i, at = (p * depth + k) * PANEL + i;
                if (is_bf16) ((bf16 *)packed)[at] = n < outputs ? ((const bf16 *)w)[n * depth + k] : 0;
                else ((float *)packed)[at] = n < outputs ? ((const float *)w)[n * depth + k] : 0;
            }
}
