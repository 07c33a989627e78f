// A decoder layer in one call: attention and gated MLP, each between optional norms and added to what went in.

typedef struct {
    Weight query, key, value, output, gate, up, down;
    Norm before_attention, of_query, of_key, after_attention, before_mlp, after_mlp;
    Shape shape;
} DecoderLayer;

static const float *normed(const Norm *norm, const float *x, long rows, float *space) {
    if (!norm->weight) return x;
    rms_norm(norm, x, rows, space);
    return space;
}

// Whole rows, or the heads in them: whichever the norm is as wide as.
static void norm_in_place(const Norm *norm, float *x, long count) {
    if (norm->weight) rms_norm(norm, x, count / norm->width, x);
}

// Buffers of a call, one behind the other.
typedef struct {
    float *in, *query, *key, *value, *attended, *out, *rest;
} Buffers;

static Buffers lay_out(const DecoderLayer *d, long rows, float *space) {
    long q = rows * d->query.outputs, kv = rows * d->key.outputs, hidden = rows * d->query.depth;
    Buffers b = {.in = space};
    b.query = b.in + hidden;
    b.key = b.query + q;
    b.value = b.key + kv;
    b.attended = b.value + kv;
    b.out = b.attended + q;
    b.rest = b.out + hidden;
    return b;
}

static long floats_of_layer(const DecoderLayer *d, long rows) {
    long q = rows * d->query.outputs, of_mlp = floats_of_mlp(&d->gate, rows);
    return 2 * (q + rows * (d->key.outputs + d->query.depth)) + (of_mlp > q ? of_mlp : q);
}

static int attention_of(const DecoderLayer *d, const Layout *l, const Cut *cut, const float *in, const float *cos,
                        const float *sin, long turned, void *keys, void *values, const Buffers *b) {
    const Shape *s = &d->shape;
    long rows = l->rows * l->queries, q = d->query.outputs, kv = d->key.outputs;
    products(3, (const Weight *[]){&d->query, &d->key, &d->value}, in, d->query.depth, rows, b->rest,
             (float *[]){b->query, b->key, b->value});
    norm_in_place(&d->of_query, b->query, rows * q);
    norm_in_place(&d->of_key, b->key, rows * kv);
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        rotate(b->query + r * q, s->heads, s->dim, cos + r * turned, sin + r * turned, turned);
        rotate(b->key + r * kv, s->kv_heads, s->dim, cos + r * turned, sin + r * turned, turned);
    }
    Heads query = {b->query, l->queries * q, s->dim, q}, key = {b->key, l->queries * kv, s->dim, kv};
    Heads value = {b->value, l->queries * kv, s->dim, kv};
    int failed = attend(l, s, cut, &query, &key, &value, keys, values, b->attended);
    product(&d->output, b->attended, q, rows, b->rest, b->out);
    norm_in_place(&d->after_attention, b->out, rows * d->query.depth);
    return failed;
}

// y[rows][hidden] from x of the same shape; rows are those of the layout times its queries. cos and sin are
// [rows][turned]. All widths are multiples of 16. 0, or 1 when memory ran out.
int lda_decoder_layer(const DecoderLayer *d, const Layout *l, const float *x, const float *cos, const float *sin,
                      long turned, void *keys, void *values, float *y) {
    Cut cut = cut_of(l, &d->shape);
    long rows = l->rows * l->queries, hidden = d->query.depth;
    float *space = malloc(floats_of_layer(d, rows) * sizeof(float));
    if (!space) return 1;
    Buffers b = lay_out(d, rows, space);
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (rows * hidden * d->gate.outputs > SMALL)
    {
        const float *in = normed(&d->before_attention, x, rows, b.in);
        failed = attention_of(d, l, &cut, in, cos, sin, turned, keys, values, &b);
        add(x, b.out, rows * hidden, y);
        in = normed(&d->before_mlp, y, rows, b.in);
        mlp(&d->gate, &d->up, &d->down, in, rows, b.rest, b.out);
        norm_in_place(&d->after_mlp, b.out, rows * hidden);
        add(y, b.out, rows * hidden, y);
    }
    free(space);
    return failed;
}
