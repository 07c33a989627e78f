// Operations on rows of float32 that transformers spells as many small ones.

// y = x / sqrt(mean(x^2) + eps) * (offset + weight), row by row.
void lda_rms_norm(const float *x, long rows, long width, const float *weight, float offset, float eps, float *y) {
#pragma omp parallel for schedule(static) if (rows * width > 65536)
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
        float scale = 1 / sqrtf(squares / (float)width + eps);
        for (i = 0; i < width; i++) to[i] = from[i] * scale * (offset + weight[i]);
    }
}
