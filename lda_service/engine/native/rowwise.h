// Operations on rows of float32 that transformers spells as many small ones, by all threads of a parallel region.

typedef struct {
    const float *weight;  // [width]; null: the operation is left out
    long width;
    float offset, eps;
} Norm;

// y = x / sqrt(mean(x^2) + eps) * (offset + weight), row by row; y may be x.
static void rms_norm(const Norm *norm, const float *x, long rows, float *y) {
    long width = norm->width;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *from = x + r * width;
        float *to = y + r * width, squares = 0;
        vec sum = splat(0);
        long i = 0;
        for (; i + LANES <= width; i += LANES) {
            vec v = load_f32(from + i);
            sum += v * v;
        }
        squares = sum_of(sum);
        for (; i < width; i++) squares += from[i] * from[i];
        float scale = 1 / sqrtf(squares / (float)width + norm->eps);
        for (i = 0; i < width; i++) to[i] = from[i] * scale * (norm->offset + norm->weight[i]);
    }
}

void lda_rms_norm(const Norm *norm, const float *x, long rows, float *y) {
#pragma omp parallel if (rows * norm->width > 65536)
    rms_norm(norm, x, rows, y);
}

// Rotate the first `turned` entries of each head of a row, the first half against the second, by a position's angles.
static inline void rotate(float *row, long heads, long dim, const float *cos, const float *sin, long turned) {
    long half = turned / 2;
    for (float *head = row; head < row + heads * dim; head += dim)
        for (long i = 0; i < half; i++) {
            float low = head[i], high = head[i + half];
            head[i] = low * cos[i] - high * sin[i];
            head[i + half] = high * cos[i + half] + low * sin[i + half];
        }
}

// y = a + b
static void add(const float *a, const float *b, long count, float *y) {
#pragma omp for schedule(static)
    for (long i = 0; i < count; i++) y[i] = a[i] + b[i];
}
