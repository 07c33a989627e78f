// The widest float vector of this processor, through the vector extension of GCC and Clang. No intrinsics.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_at __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef bf16 half_at __attribute__((vector_size(LANES * 2), aligned(2)));

static inline vec splat(float x) { return x - (vec){0}; }
static inline vec load_f32(const float *p) { return *(const vec_at *)p; }
static inline vec load_bf16(const bf16 *p) { return (vec)(__builtin_convertvector(*(const half_at *)p, uvec) << 16); }
static inline void store(float *p, vec v) { *(vec_at *)p = v; }
static inline vec where(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
static inline vec larger(vec a, vec b) { return where(a > b, a, b); }

static inline float widen(bf16 x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

// Round to nearest, ties to even; NaN stays NaN.
static inline bf16 narrow(float x) {
    union { float value; uint32_t bits; } u = {x};
    if (x != x) return (bf16)(u.bits >> 16 | 0x40);
    return (bf16)((u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16);
}

static inline float sum_of(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static inline float largest_of(vec v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
}

// e^x within 2 units in the last place for x <= 88; exactly 0 below -87, so that -inf weighs nothing.
static inline vec exp_of(vec x) {
    const vec rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec n = (x * splat(1.44269504f) + rounder) - rounder;
    vec r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1);
    vec scale = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
    return where(x < splat(-87), splat(0), p * scale);
}
