/* The hot loops of a few operators, over stored bytes: load as fp32, compute, store, a block at a time.

   Each function gives, bit for bit, what the operators' definitions in Python give (tests/test_compiled.py), which fixes
   the order of every addition: no fused multiply-add (-ffp-contract=off), no reassociation. Sums run in fp64 over rows of
   ROW entries, each halved until one number is left, so that no bit depends on the width of the machine's vectors. */

#include "stored.h"

enum elect { EVERY, BY_WEIGHTED, BY_UNWEIGHTED }; /* whose sign decides what is merged; EVERY: none does */
enum divide { BY_NOTHING, BY_WEIGHTS, BY_COUNT };

/* How one delta is thinned: entries at least as large as a boundary, or entries drawn at random, are kept. */
typedef struct {
    int32_t kind; /* 0: all are kept, and nothing is multiplied; 1: by size; 2: at random */
    float factor; /* of what is kept */
    float value;
    int64_t last; /* the last index, in the whole tensor, that an entry of exactly this magnitude may have */
    uint64_t key; /* of the random stream */
    uint64_t limit; /* kept where the draw, of 53 bits, is below it */
    uint8_t *marks; /* what is drawn for the whole tensor, once it is: bit i % 8 of byte i / 8; NULL: it is drawn anew */
} thinning;

/* How thinned deltas are added up. */
typedef struct {
    int32_t elect;
    int32_t divide;
    float divisor; /* where all are merged: the sum of the weights, or the count */
    float scale;
} merging;

INLINE void finish(
    float *restrict sum, const float *restrict base, float divisor, float scale, void *out, int dtype, size_t start,
    size_t count
) {
    if (divisor != 1.0f)
        for (size_t i = 0; i < count; i++) sum[i] /= divisor;
    if (scale != 1.0f)
        for (size_t i = 0; i < count; i++) sum[i] *= scale;
    if (base)
        for (size_t i = 0; i < count; i++) sum[i] += base[i];
    store(out, sum, dtype, start, count);
}

/* ---- linear, task_arithmetic, slerp, casts: [base +] (sum w_i · (x_i [- base])) / divisor · scale */

API WIDE void weighted_sum(
    size_t entries, int models, const tensor *inputs, const float *weights, tensor base, float divisor, float scale,
    void *out, int dtype
) {
    float sum[BLOCK], one[BLOCK], below[BLOCK];
    for (size_t start = 0; start < entries; start += BLOCK) {
        size_t count = block_at(start, entries, BLOCK);
        const float *from = base.data ? below : NULL;
        int present = 0;
        if (from) load(below, base.data, base.dtype, start, count);
        for (int model = 0; model < models; model++) {
            float weight = weights[model];
            if (weight == 0.0f) continue;
            if (!present++) {
                load_vector(sum, inputs[model], from, start, count);
                for (size_t i = 0; i < count; i++) sum[i] *= weight;
            } else {
                load_vector(one, inputs[model], from, start, count);
                for (size_t i = 0; i < count; i++) sum[i] += one[i] * weight;
            }
        }
        if (!present) memset(sum, 0, sizeof sum);
        finish(sum, from, divisor, scale, out, dtype, start, count);
    }
}

/* ---- sums over rows, halved until one number is left; what is lacking of the last row counts as zero */

#define EIGHTH (ROW / 8)

typedef double term(const float *a, const float *b, size_t i);

INLINE double product(const float *a, const float *b, size_t i) { return (double)a[i] * (double)b[i]; }

INLINE double magnitude(const float *a, const float *b, size_t i) {
    (void)b;
    return fabsf(a[i]);
}

/* What the first three halvings leave at a place: its terms, added up in registers. */
INLINE double two(term of, const float *a, const float *b, size_t i) { return of(a, b, i) + of(a, b, i + ROW / 2); }
INLINE double four(term of, const float *a, const float *b, size_t i) {
    return two(of, a, b, i) + two(of, a, b, i + ROW / 4);
}
INLINE double eight(term of, const float *a, const float *b, size_t i) {
    return four(of, a, b, i) + four(of, a, b, i + EIGHTH);
}

/* Halve what these leave until one number is left. */
INLINE double halved(double *restrict sums) {
    for (size_t half = EIGHTH / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

INLINE void load_row(float *restrict to, tensor from, size_t start, size_t count) {
    load(to, from.data, from.dtype, start, count);
    for (size_t i = count; i < ROW; i++) to[i] = 0.0f;
}

/* The inner products of two tensors: sums[3][row], of the first with itself, of both, of the second with itself. */
API WIDE void inner_products(size_t entries, tensor first, tensor second, double *sums) {
    float a[ROW], b[ROW];
    double own[EIGHTH], both[EIGHTH], other[EIGHTH];
    size_t rows = (entries + ROW - 1) / ROW;
    for (size_t row = 0; row < rows; row++) {
        size_t start = row * ROW, count = block_at(start, entries, ROW);
        load_row(a, first, start, count);
        load_row(b, second, start, count);
        for (size_t i = 0; i < EIGHTH; i++) { /* in one loop, so that each entry is widened once */
            own[i] = eight(product, a, a, i);
            both[i] = eight(product, a, b, i);
            other[i] = eight(product, b, b, i);
        }
        sums[row] = halved(own);
        sums[rows + row] = halved(both);
        sums[2 * rows + row] = halved(other);
    }
}

/* ---- random masks: SplitMix64 at counter index + 1 of the stream `key` */

#define GOLDEN 0x9e3779b97f4a7c15u

/* The draw, of 53 bits, in a state: key + (index + 1) · GOLDEN. */
INLINE uint64_t drawn(uint64_t state) {
    state = (state ^ state >> 30) * 0xbf58476d1ce4e5b9u;
    state = (state ^ state >> 27) * 0x94d049bb133111ebu;
    return (state ^ state >> 31) >> 11;
}

#ifdef MASKS
MASKS static void draw_by_masks(uint64_t state, uint64_t limit, size_t count, uint8_t *marks) {
    __m512i low = _mm512_set1_epi64((int64_t)0xbf58476d1ce4e5b9u), high = _mm512_set1_epi64((int64_t)0x94d049bb133111ebu);
    __m512i most = _mm512_set1_epi64((int64_t)limit), step = _mm512_set1_epi64((int64_t)(8 * GOLDEN));
    __m512i lanes = _mm512_set_epi64(8, 7, 6, 5, 4, 3, 2, 1);
    __m512i next = _mm512_mullo_epi64(lanes, _mm512_set1_epi64((int64_t)GOLDEN));
    next = _mm512_add_epi64(next, _mm512_set1_epi64((int64_t)state));
#pragma GCC unroll 4
    for (size_t i = 0; i < count; i += 8) {
        __m512i now = _mm512_mullo_epi64(_mm512_xor_si512(next, _mm512_srli_epi64(next, 30)), low);
        now = _mm512_mullo_epi64(_mm512_xor_si512(now, _mm512_srli_epi64(now, 27)), high);
        now = _mm512_srli_epi64(_mm512_xor_si512(now, _mm512_srli_epi64(now, 31)), 11);
        marks[i / 8] = _mm512_cmplt_epu64_mask(now, most);
        next = _mm512_add_epi64(next, step);
    }
}

MASKS static void keep_by_masks(float *delta, const uint8_t *marks, float factor, size_t count) {
    __m512 by = _mm512_set1_ps(factor);
    for (size_t i = 0; i < count; i += 16) {
        __mmask16 kept;
        memcpy(&kept, marks + i / 8, 2);
        _mm512_storeu_ps(delta + i, _mm512_mul_ps(_mm512_maskz_loadu_ps(kept, delta + i), by));
    }
}
#endif

/* Draw which of a block's entries are kept, the first of which has this index in the whole tensor: whole bytes of marks. */
INLINE void draw(thinning how, uint64_t index, size_t count, uint8_t *restrict marks) {
    uint64_t state = how.key + index * GOLDEN, eight;
    uint8_t kept[ROW];
#ifdef MASKS
    if (HAS_MASKS) {
        draw_by_masks(state, how.limit, count, marks);
        return;
    }
#endif
    for (size_t i = 0; i < count; i++) kept[i] = drawn(state += GOLDEN) < how.limit;
    for (size_t i = count; i % 8; i++) kept[i] = 0;
    for (size_t i = 0; i < count; i += 8) {
        memcpy(&eight, kept + i, 8);
        marks[i / 8] = (uint8_t)(eight * 0x0102040810204080u >> 56); /* one bit of each byte; as the bytes lie: little-endian */
    }
}

/* Keep what is marked of a block, times a factor. */
INLINE void keep_marked(float *restrict delta, const uint8_t *restrict marks, float factor, size_t count) {
    size_t whole = 0;
#ifdef MASKS
    if (HAS_MASKS) keep_by_masks(delta, marks, factor, whole = count / 16 * 16);
#endif
    for (size_t i = whole; i < count; i += 8) {
        size_t last = count - i < 8 ? count - i : 8;
        uint32_t eight = marks[i / 8];
        for (size_t k = 0; k < last; k++) delta[i + k] = of_bits(bits_of(delta[i + k]) & -(eight >> k & 1)) * factor;
    }
}

/* Thin a block of a delta whose first entry has this index in the whole tensor. */
INLINE void thin(float *restrict delta, thinning how, uint64_t index, size_t count) {
    if (how.kind == 1) {
        int64_t left = how.last - (int64_t)index; /* equal ones are kept up to here */
        if (left >= (int64_t)count) {
            for (size_t i = 0; i < count; i++) delta[i] = (fabsf(delta[i]) >= how.value ? delta[i] : 0.0f) * how.factor;
        } else if (left < 0) {
            for (size_t i = 0; i < count; i++) delta[i] = (fabsf(delta[i]) > how.value ? delta[i] : 0.0f) * how.factor;
        } else {
            for (size_t i = 0; i < count; i++) {
                float size = fabsf(delta[i]);
                int kept = (size > how.value) | ((size == how.value) & ((int64_t)i <= left));
                delta[i] = (kept ? delta[i] : 0.0f) * how.factor;
            }
        }
    } else if (how.kind == 2) {
        uint8_t anew[ROW / 8];
        if (!how.marks) draw(how, index, count, anew);
        keep_marked(delta, how.marks ? how.marks + index / 8 : anew, how.factor, count);
    }
}

#ifdef MASKS
/* As three halvings of the magnitudes of a row leave them, of all and of what is marked: each entry is widened once. */
MASKS static void add_by_masks(const float *row, const uint8_t *marks, double *every, double *kept) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    for (size_t i = 0; i < EIGHTH; i += 8) {
        __m512d all[4], some[4];
        for (size_t k = 0; k < 4; k++) {
            size_t at = i + k * EIGHTH, far = at + ROW / 2;
            __m512d near_by = _mm512_cvtps_pd(_mm256_andnot_ps(sign, _mm256_loadu_ps(row + at)));
            __m512d far_off = _mm512_cvtps_pd(_mm256_andnot_ps(sign, _mm256_loadu_ps(row + far)));
            __m512d first = _mm512_maskz_mov_pd(marks[at / 8], near_by);
            all[k] = _mm512_add_pd(near_by, far_off);
            some[k] = _mm512_mask_add_pd(first, marks[far / 8], first, far_off);
        }
        all[0] = _mm512_add_pd(all[0], all[2]), all[1] = _mm512_add_pd(all[1], all[3]);
        some[0] = _mm512_add_pd(some[0], some[2]), some[1] = _mm512_add_pd(some[1], some[3]);
        _mm512_storeu_pd(every + i, _mm512_add_pd(all[0], all[1]));
        _mm512_storeu_pd(kept + i, _mm512_add_pd(some[0], some[1]));
    }
}
#endif

/* For one model, the sums over rows of |delta|, and of |delta| of what is kept: sums[2][row]. Draws its marks, if it has
   room for them. */
API WIDE void magnitudes(
    size_t entries, tensor input, tensor base, const thinning *how, int64_t index, double *sums
) {
    float one[ROW];
    double terms[EIGHTH], kept[EIGHTH];
    size_t rows = (entries + ROW - 1) / ROW;
    thinning keep = *how;
    keep.factor = 1.0f;
    for (size_t row = 0; row < rows; row++) {
        size_t start = row * ROW, count = block_at(start, entries, ROW);
        load_delta(one, input, base, start, count);
        for (size_t i = count; i < ROW; i++) one[i] = 0.0f;
        if (keep.marks) draw(keep, (uint64_t)index + start, count, keep.marks + ((size_t)index + start) / 8);
#ifdef MASKS
        if (keep.marks && HAS_MASKS) {
            add_by_masks(one, keep.marks + ((size_t)index + start) / 8, terms, kept);
        } else
#endif
        {
            for (size_t i = 0; i < EIGHTH; i++) terms[i] = eight(magnitude, one, NULL, i);
            thin(one, keep, (uint64_t)index + start, count);
            for (size_t i = 0; i < EIGHTH; i++) kept[i] = eight(magnitude, one, NULL, i);
        }
        sums[row] = halved(terms);
        sums[rows + row] = halved(kept);
    }
}

/* ---- ties, dare: base + what is made of the thinned deltas */

INLINE void sum_of_all(
    float *restrict sum, const float *restrict deltas, const float *weights, int models, size_t count
) {
    int present = 0;
    for (int model = 0; model < models; model++) {
        const float *delta = deltas + model * BLOCK;
        float weight = weights[model];
        if (weight == 0.0f) continue;
        if (!present++)
            for (size_t i = 0; i < count; i++) sum[i] = delta[i] * weight;
        else
            for (size_t i = 0; i < count; i++) sum[i] += delta[i] * weight;
    }
    if (!present) memset(sum, 0, count * sizeof(float));
}

INLINE void sum_of_agreeing(
    float *restrict sum, const float *restrict deltas, const float *weights, int models, merging how, size_t count
) {
    float votes[BLOCK], shares[BLOCK];
    for (int model = 0; model < models; model++) {
        const float *delta = deltas + model * BLOCK;
        float weight = how.elect == BY_WEIGHTED ? weights[model] : 1.0f;
        if (!model)
            for (size_t i = 0; i < count; i++) votes[i] = delta[i] * weight;
        else
            for (size_t i = 0; i < count; i++) votes[i] += delta[i] * weight;
    }
    for (int model = 0; model < models; model++) {
        const float *restrict delta = deltas + model * BLOCK;
        float weight = weights[model], vote = how.elect == BY_WEIGHTED ? weight : 1.0f;
        float share = how.divide == BY_COUNT ? 1.0f : weight;
        for (size_t i = 0; i < count; i++) {
            float voice = delta[i] * vote;
            uint32_t plus = votes[i] >= 0.0f ? 0u : 0x80000000u;
            uint32_t same = of_bits(bits_of(voice) ^ plus) > 0.0f ? 0xffffffffu : 0u;
            float more = of_bits(bits_of(delta[i] * weight) & same), by = of_bits(bits_of(share) & same);
            sum[i] = model ? sum[i] + more : more;
            shares[i] = model ? shares[i] + by : by;
        }
    }
    if (how.divide != BY_NOTHING)
        for (size_t i = 0; i < count; i++) sum[i] /= shares[i] == 0.0f ? 1.0f : shares[i];
}

API WIDE void thinned_sum(
    size_t entries, int models, const tensor *inputs, const float *weights, const thinning *thin_by, tensor base,
    merging how, int64_t index, float *scratch /* [models][BLOCK] */, void *out, int dtype
) {
    float sum[BLOCK], below[BLOCK];
    for (size_t start = 0; start < entries; start += BLOCK) {
        size_t count = block_at(start, entries, BLOCK);
        const float *from = base.data ? below : NULL;
        if (from) load(below, base.data, base.dtype, start, count);
        for (int model = 0; model < models; model++) {
            load_vector(scratch + model * BLOCK, inputs[model], from, start, count);
            thin(scratch + model * BLOCK, thin_by[model], (uint64_t)index + start, count);
        }
        if (how.elect == EVERY)
            sum_of_all(sum, scratch, weights, models, count);
        else
            sum_of_agreeing(sum, scratch, weights, models, how, count);
        finish(sum, from, how.elect == EVERY ? how.divisor : 1.0f, how.scale, out, dtype, start, count);
    }
}

/* ---- low-rank products */

#define TILE 16 /* columns, and four rows, that are multiplied at once in registers */
typedef double lane __attribute__((vector_size(64)));
#define EACH(x) ((lane){x, x, x, x, x, x, x, x})

/* A matrix of factors: the entry (i, k) of its rank k lies at i · step + k · stride. */
typedef struct {
    tensor of;
    int64_t step;
    int64_t stride;
} factor;

/* Load rows, or columns, `first` to `first + count` of a factor in fp64: to[i · i_step + k · k_step]. */
INLINE void load_factor(
    double *restrict to, factor from, size_t first, size_t count, size_t rank, size_t i_step, size_t k_step
) {
    for (size_t i = 0; i < count; i++) {
        for (size_t k = 0; k < rank; k++) {
            float one;
            load(&one, from.of.data, from.of.dtype, (first + i) * (size_t)from.step + k * (size_t)from.stride, 1);
            to[i * i_step + k * k_step] = one;
        }
    }
}

/* A run of scale · left · right, flat, of a matrix of this width. Products of fp32 are exact in fp64; they are added up in
   the order of the rank. */
API WIDE void low_rank(
    size_t start, size_t entries, size_t width, size_t rank, factor left, factor right, double scale,
    double *scratch /* [rank][TILE], [rows, a multiple of 4][rank] */, float *out
) {
    double *columns = scratch, *factors = scratch + rank * TILE;
    size_t first = start / width, stop = start + entries, rows = (stop - 1) / width + 1 - first;
    load_factor(factors, left, first, rows, rank, rank, 1);
    memset(factors + rows * rank, 0, (-rows & 3) * rank * sizeof(double));
    for (size_t column = 0; column < width; column += TILE) {
        size_t across = width - column < TILE ? width - column : TILE;
        if (across < TILE) memset(columns, 0, rank * TILE * sizeof(double));
        load_factor(columns, right, column, across, rank, 1, TILE);
        for (size_t row = 0; row < rows; row += 4) {
            lane sums[4][TILE / 8];
            double values[4][TILE];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < TILE / 8; j++) sums[i][j] = EACH(-0.0);
            for (size_t k = 0; k < rank; k++) {
                lane now[TILE / 8];
                memcpy(now, columns + k * TILE, sizeof now);
                for (size_t i = 0; i < 4; i++) {
                    double by = factors[(row + i) * rank + k];
                    for (int j = 0; j < TILE / 8; j++) sums[i][j] += EACH(by) * now[j];
                }
            }
            memcpy(values, sums, sizeof values);
            for (size_t i = 0; i < 4 && row + i < rows; i++) {
                size_t at = (first + row + i) * width + column; /* a run may begin and end within a row */
                size_t from = at < start ? start - at : 0, to = at + across > stop ? stop - at : across;
                if (at >= stop) continue;
                for (size_t j = from; j < to; j++) out[at + j - start] = (float)(values[i][j] * scale);
            }
        }
    }
}

/* ---- NaN and infinity: entries whose bits have a value under a mask */

#define COUNT_MATCHING(type, block)                                                                                   \
    for (size_t start = 0; start < entries; start += block) {                                                         \
        const type *raw = (const type *)data + start, under = (type)mask, wanted = (type)value;                       \
        size_t count = entries - start < block ? entries - start : block;                                             \
        type some = 0; /* as narrow as the entries, so that all lanes of a vector count */                            \
        for (size_t i = 0; i < count; i++) some += (type)((raw[i] & under) == wanted);                                \
        found += (int64_t)some;                                                                                       \
    }

API WIDE int64_t count_matching(size_t entries, const void *data, int width, uint64_t mask, uint64_t value) {
    int64_t found = 0;
    switch (width) {
    case 1: COUNT_MATCHING(uint8_t, 128) break;
    case 2: COUNT_MATCHING(uint16_t, 32768) break;
    case 4: COUNT_MATCHING(uint32_t, 32768) break;
    default: COUNT_MATCHING(uint64_t, 32768)
    }
    return found;
}
