// SPDX-License-Identifier: Apache-2.0
/* A pass of a decoder over a few tokens: hidden states in, logits out, over a paged cache.
 *
 * With few tokens the speed is limited by reading the weights, so each weight is read once, by rows that are split across the
 * threads; activations are fp32. Models: RMSNorm, rotary positions, grouped queries, gated feed-forward. GCC or clang.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
#define INLINE static inline __attribute__((always_inline))

enum { F32, BF16, INT8 };

typedef struct { const void *data; const float *scale; } Matrix; /* scale: one per row of an INT8 matrix */
typedef struct {
    const float *norm1, *norm2, *bias; /* bias [qkv rows] or NULL */
    Matrix qkv, proj, fc1, fc2;
    void *keys, *values; /* [slots, groups, dim] */
} Layer;
typedef struct {
    int64_t layers, hidden, heads, groups, dim, ffn, rotary, interleaved, gelu, weights, cache, vocab;
    float epsilon, scale;
    const Layer *layer;
    const float *norm;
    Matrix head;
} Model;

INLINE v16 load_f32(const float *p) { v16 v; memcpy(&v, p, 64); return v; }
INLINE v16 load_bf16(const uint16_t *p) {
    h16 h; memcpy(&h, p, 32);
    u16 w = __builtin_convertvector(h, u16) << 16;
    return (v16)w;
}

/* Load 64 numbers of a row as four vectors. bf16 and int8 are unpacked within their 32-bit words, which is much faster than
 * widening them: vector i holds numbers i, i + 2, ... (bf16) or i, i + 4, ... (int8), and `order` permutes the inputs to match. */
INLINE void unpack_f32(const float *p, v16 *w) { for (int i = 0; i < 4; i++) w[i] = load_f32(p + 16 * i); }
INLINE void unpack_bf16(const uint16_t *p, v16 *w) {
    for (int i = 0; i < 2; i++) {
        u16 both; memcpy(&both, p + 32 * i, 64);
        w[2 * i] = (v16)(both << 16); w[2 * i + 1] = (v16)(both & 0xffff0000u);
    }
}
INLINE void unpack_int8(const int8_t *p, v16 *w) {
    i16 all; memcpy(&all, p, 64);
    for (int i = 0; i < 4; i++) w[i] = __builtin_convertvector((all << (24 - 8 * i)) >> 24, v16);
}
static void order(int64_t weights, const float *x, float *y, int64_t cols) {
    int64_t words = weights == F32 ? 1 : weights == BF16 ? 2 : 4, c = 0;
    for (; c + 64 <= cols; c += 64)
        for (int64_t i = 0; i < 64; i++) {
            int64_t block = i / (16 * words), in = i % (16 * words);
            y[c + block * 16 * words + in % words * 16 + in / words] = x[c + i];
        }
    memcpy(y + c, x + c, (cols - c) * sizeof(float));
}
INLINE float one_f32(const float *p) { return *p; }
INLINE float one_bf16(const uint16_t *p) { uint32_t w = (uint32_t)*p << 16; float f; memcpy(&f, &w, 4); return f; }
INLINE float one_int8(const int8_t *p) { return *p; }
INLINE float sum(v16 v) { float s = 0; for (int i = 0; i < 16; i++) s += v[i]; return s; }
INLINE uint16_t to_bf16(float f) {
    uint32_t w; memcpy(&w, &f, 4);
    return (uint16_t)((w + 0x7fff + ((w >> 16) & 1)) >> 16);
}

/* y[n][r] for R rows of a matrix and N inputs, with A accumulators for each */
#define TILE(kind, type)                                                                                               \
    INLINE void tile_##kind(const type *w, const float *scale, const float *x, float *y, int64_t cols, int64_t rows,   \
                            const int R, const int N, const int A) {                                                   \
        v16 acc[16];                                                                                                   \
        for (int i = 0; i < R * N * A; i++) acc[i] = (v16){0};                                                         \
        int64_t c = 0;                                                                                                 \
        for (; c + 64 <= cols; c += 64)                                                                                \
            for (int r = 0; r < R; r++) {                                                                              \
                v16 row[4];                                                                                            \
                unpack_##kind(w + r * cols + c, row);                                                                  \
                for (int n = 0; n < N; n++) for (int i = 0; i < 4; i++)                                                \
                    acc[(r * N + n) * A + i % A] += row[i] * load_f32(x + n * cols + c + 16 * i);                      \
            }                                                                                                          \
        for (int r = 0; r < R; r++) for (int n = 0; n < N; n++) {                                                      \
            float s = 0;                                                                                               \
            for (int i = 0; i < A; i++) s += sum(acc[(r * N + n) * A + i]);                                            \
            for (int64_t t = c; t < cols; t++) s += one_##kind(w + r * cols + t) * x[n * cols + t];                    \
            y[n * rows + r] = scale ? s * scale[r] : s;                                                                \
        }                                                                                                              \
    }                                                                                                                  \
    static void block_##kind(const type *w, const float *scale, const float *x, float *y, int64_t cols, int64_t rows,  \
                             int64_t count, int64_t tokens) {                                                          \
        for (int64_t r = 0; r < count; ) {                                                                             \
            const int step = tokens > 1 && count - r >= 4 ? 4 : 1;                                                     \
            const type *at = w + r * cols;                                                                             \
            const float *by = scale ? scale + r : 0;                                                                   \
            for (int64_t n = 0; n < tokens; ) {                                                                        \
                const float *in = x + n * cols; float *out = y + n * rows + r;                                         \
                int64_t left = tokens - n;                                                                             \
                if (step == 4 && left >= 4) { tile_##kind(at, by, in, out, cols, rows, 4, 4, 1); n += 4; }             \
                else if (step == 4 && left >= 2) { tile_##kind(at, by, in, out, cols, rows, 4, 2, 2); n += 2; }        \
                else if (step == 4) { tile_##kind(at, by, in, out, cols, rows, 4, 1, 4); n += 1; }                     \
                else { tile_##kind(at, by, in, out, cols, rows, 1, 1, 4); n += 1; }                                    \
            }                                                                                                          \
            r += step;                                                                                                 \
        }                                                                                                              \
    }
TILE(f32, float)
TILE(bf16, uint16_t)
TILE(int8, int8_t)

/* y[n][rows] = x[n][cols] w^T, rows split across the threads; ends with a barrier. ordered: workspace for the inputs */
static void linear(const Model *m, Matrix w, const float *x, float *y, int64_t cols, int64_t rows, int64_t tokens, float *ordered) {
    const int64_t chunk = 16, chunks = (rows + chunk - 1) / chunk;
    if (m->weights != F32) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens; n++) order(m->weights, x + n * cols, ordered + n * cols, cols);
        x = ordered;
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < chunks; k++) {
        int64_t r = k * chunk, count = rows - r < chunk ? rows - r : chunk;
        if (m->weights == F32) block_f32((const float *)w.data + r * cols, 0, x, y + r, cols, rows, count, tokens);
        else if (m->weights == BF16) block_bf16((const uint16_t *)w.data + r * cols, 0, x, y + r, cols, rows, count, tokens);
        else block_int8((const int8_t *)w.data + r * cols, w.scale + r, x, y + r, cols, rows, count, tokens);
    }
}

static void norm(const Model *m, const float *gain, const float *x, float *y, int64_t tokens) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < tokens; n++) {
        const float *in = x + n * m->hidden;
        float s = 0;
        for (int64_t i = 0; i < m->hidden; i++) s += in[i] * in[i];
        s = 1 / sqrtf(s / m->hidden + m->epsilon);
        for (int64_t i = 0; i < m->hidden; i++) y[n * m->hidden + i] = in[i] * s * gain[i];
    }
}

static void rotate(const Model *m, float *x, const float *cos, const float *sin) {
    int64_t half = m->rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        int64_t a = m->interleaved ? 2 * i : i, b = m->interleaved ? 2 * i + 1 : i + half;
        float first = x[a], second = x[b];
        x[a] = first * cos[a] - second * sin[a];
        x[b] = second * cos[b] + first * sin[b];
    }
}

INLINE float at_cache(const Model *m, const void *base, int64_t i) {
    return m->cache == F32 ? ((const float *)base)[i] : one_bf16((const uint16_t *)base + i);
}
static void store(const Model *m, void *base, int64_t i, const float *x) {
    for (int64_t d = 0; d < m->dim; d++) {
        if (m->cache == F32) ((float *)base)[i + d] = x[d];
        else ((uint16_t *)base)[i + d] = to_bf16(x[d]);
    }
}
INLINE float dot(const Model *m, const void *base, int64_t i, const float *q) {
    v16 acc = {0};
    int64_t d = 0;
    for (; d + 16 <= m->dim; d += 16)
        acc += load_f32(q + d) * (m->cache == F32 ? load_f32((const float *)base + i + d) : load_bf16((const uint16_t *)base + i + d));
    float s = sum(acc);
    for (; d < m->dim; d++) s += q[d] * at_cache(m, base, i + d);
    return s;
}
INLINE void add(const Model *m, const void *base, int64_t i, float p, float *out) {
    int64_t d = 0;
    for (; d + 16 <= m->dim; d += 16) {
        v16 v = m->cache == F32 ? load_f32((const float *)base + i + d) : load_bf16((const uint16_t *)base + i + d);
        v = load_f32(out + d) + v * p;
        memcpy(out + d, &v, 64);
    }
    for (; d < m->dim; d++) out[d] += p * at_cache(m, base, i + d);
}

/* Attention of one query to the keys in slots[0 .. count); scores: workspace for count numbers */
static void attend(const Model *m, const Layer *l, int64_t group, const float *q, const int64_t *slots, int64_t count, float *scores,
                   float *out) {
    float most = -INFINITY, total = 0;
    for (int64_t j = 0; j < count; j++) {
        scores[j] = m->scale * dot(m, l->keys, (slots[j] * m->groups + group) * m->dim, q);
        if (scores[j] > most) most = scores[j];
    }
    memset(out, 0, m->dim * sizeof(float));
    for (int64_t j = 0; j < count; j++) {
        float p = expf(scores[j] - most);
        total += p;
        add(m, l->values, (slots[j] * m->groups + group) * m->dim, p, out);
    }
    for (int64_t d = 0; d < m->dim; d++) out[d] /= total;
}

static float activate(const Model *m, float x) {
    if (m->gelu == 2) return 0.5f * x * (1 + erff(x * 0.70710678f));
    if (m->gelu) return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x / (1 + expf(-x));
}

/* Overwrites x [tokens, hidden] with the hidden states after the last layer; logits [wanted, vocab] are those of the tokens `last`.
 * Token n writes its key and value to slot[n] and attends to slots[begin[n] .. begin[n] + count[n]).
 * workspace: tokens x (2 hidden + qkv rows + heads x dim + 3 ffn + widest of the three), then threads x longest count. */
void step(const Model *m, int64_t tokens, float *x, const float *cos, const float *sin, const int64_t *slot, const int64_t *slots,
          const int64_t *begin, const int64_t *count, int64_t longest, float *workspace, int64_t wanted, const int64_t *last,
          float *logits, int64_t threads) {
    const int64_t per = m->heads / m->groups, rows = m->groups * (per + 2) * m->dim, wide = m->heads * m->dim;
    float *normed = workspace, *added = normed + tokens * m->hidden, *qkv = added + tokens * m->hidden, *context = qkv + tokens * rows;
    float *up = context + tokens * wide, *gated = up + tokens * 2 * m->ffn;
    const int64_t widest = m->ffn > wide ? (m->ffn > m->hidden ? m->ffn : m->hidden) : (wide > m->hidden ? wide : m->hidden);
    float *ordered = gated + tokens * m->ffn, *scores = ordered + tokens * widest;
#pragma omp parallel num_threads(threads)
    {
        for (int64_t k = 0; k < m->layers; k++) {
            const Layer *l = m->layer + k;
            norm(m, l->norm1, x, normed, tokens);
            linear(m, l->qkv, normed, qkv, m->hidden, rows, tokens, ordered);
#pragma omp for schedule(static) collapse(2)
            for (int64_t n = 0; n < tokens; n++)
                for (int64_t g = 0; g < m->groups; g++) {
                    float *at = qkv + n * rows + g * (per + 2) * m->dim;
                    if (l->bias) for (int64_t i = 0; i < (per + 2) * m->dim; i++) at[i] += l->bias[g * (per + 2) * m->dim + i];
                    for (int64_t h = 0; h <= per; h++) rotate(m, at + h * m->dim, cos + n * m->rotary, sin + n * m->rotary);
                    store(m, l->keys, (slot[n] * m->groups + g) * m->dim, at + per * m->dim);
                    store(m, l->values, (slot[n] * m->groups + g) * m->dim, at + (per + 1) * m->dim);
                }
#pragma omp for schedule(static) collapse(2)
            for (int64_t n = 0; n < tokens; n++)
                for (int64_t h = 0; h < m->heads; h++) {
#ifdef _OPENMP
                    extern int omp_get_thread_num(void);
                    float *mine = scores + omp_get_thread_num() * longest;
#else
                    float *mine = scores;
#endif
                    int64_t g = h / per;
                    attend(m, l, g, qkv + n * rows + (g * (per + 2) + h % per) * m->dim, slots + begin[n], count[n], mine,
                           context + n * wide + h * m->dim);
                }
            linear(m, l->proj, context, added, wide, m->hidden, tokens, ordered);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tokens * m->hidden; i++) x[i] += added[i];
            norm(m, l->norm2, x, normed, tokens);
            linear(m, l->fc1, normed, up, m->hidden, 2 * m->ffn, tokens, ordered);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tokens * m->ffn; i++) {
                const float *at = up + i / m->ffn * 2 * m->ffn + i % m->ffn;
                gated[i] = activate(m, at[0]) * at[m->ffn];
            }
            linear(m, l->fc2, gated, added, m->ffn, m->hidden, tokens, ordered);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < tokens * m->hidden; i++) x[i] += added[i];
        }
        norm(m, m->norm, x, normed, tokens);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < wanted; n++) memcpy(added + n * m->hidden, normed + last[n] * m->hidden, m->hidden * sizeof(float));
        linear(m, m->head, added, logits, m->hidden, m->vocab, wanted, ordered);
    }
}
