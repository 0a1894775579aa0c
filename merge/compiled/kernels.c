/* The hot loops of a few operators, over stored bytes: load as fp32, compute, store, a block at a time.

   Each function gives, bit for bit, what the operators' definitions in Python give (tests/test_compiled.py), which fixes
   the order of every addition: no fused multiply-add (-ffp-contract=off), no reassociation. Sums run in fp64 over rows of
   ROW entries, each halved until one number is left, so that no bit depends on the width of the machine's vectors. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ROW 4096 /* merge/kernels.py has the same */
#define BLOCK 1024 /* entries that are worked on at once, so that all that is made of them stays in the nearest cache */
#define GRID 65536 /* merge/evaluate.py has the same */

/* PORTABLE: as on machines of other kinds, for the tests */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(PORTABLE)
#include <immintrin.h>
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define MASKS __attribute__((target("avx512f,avx512vl,avx512dq"))) /* written by hand where vectors have masks */
#define HAS_MASKS (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#else
#define WIDE
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

enum dtype { F32, BF16, F16 };                      /* library.py has the same numbers */
enum elect { EVERY, BY_WEIGHTED, BY_UNWEIGHTED };   /* whose sign decides what is merged; EVERY: none does */
enum divide { BY_NOTHING, BY_WEIGHTS, BY_COUNT };

typedef struct {
    const void *data; /* of the entries that are worked on */
    int32_t dtype;
} tensor;

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

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* ---- dtypes: IEEE 754, to nearest, ties to even */

INLINE float from_half(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float scaled = of_bits(magnitude) * 0x1p112f; /* exact, of subnormal halves too */
    uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits_of(scaled);
    return of_bits(bits | sign);
}

INLINE uint16_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t tiny = bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000u; /* the addition rounds to the last place of a half */
    uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
    uint32_t half = magnitude >= 0x477ff000u ? special : magnitude < 0x38800000u ? tiny : normal;
    return (uint16_t)(half | sign >> 16);
}

INLINE uint16_t to_bfloat(float value) {
    uint32_t bits = bits_of(value), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE void load(float *restrict to, const void *from, int dtype, size_t start, size_t count) {
    if (dtype == F32) {
        memcpy(to, (const float *)from + start, count * sizeof(float));
    } else if (dtype == BF16) {
        const uint16_t *raw = (const uint16_t *)from + start;
        for (size_t i = 0; i < count; i++) to[i] = of_bits((uint32_t)raw[i] << 16);
    } else {
        const uint16_t *raw = (const uint16_t *)from + start;
        for (size_t i = 0; i < count; i++) to[i] = from_half(raw[i]);
    }
}

INLINE void store(void *to, const float *restrict from, int dtype, size_t start, size_t count) {
    if (dtype == F32) {
        memcpy((float *)to + start, from, count * sizeof(float));
    } else if (dtype == BF16) {
        uint16_t *raw = (uint16_t *)to + start;
        for (size_t i = 0; i < count; i++) raw[i] = to_bfloat(from[i]);
    } else {
        uint16_t *raw = (uint16_t *)to + start;
        for (size_t i = 0; i < count; i++) raw[i] = to_half(from[i]);
    }
}

/* Load a block of one model: its weights, or minus those of the base, where there is one. */
INLINE void load_vector(float *restrict to, tensor from, const float *restrict base, size_t start, size_t count) {
    if (base && from.dtype == BF16) { /* in one go */
        const uint16_t *raw = (const uint16_t *)from.data + start;
        for (size_t i = 0; i < count; i++) to[i] = of_bits((uint32_t)raw[i] << 16) - base[i];
        return;
    }
    load(to, from.data, from.dtype, start, count);
    if (base)
        for (size_t i = 0; i < count; i++) to[i] -= base[i];
}

/* Load at most a row of one model: its weights, or minus those of the base, where there is one. */
INLINE void load_delta(float *restrict to, tensor from, tensor base, size_t start, size_t count) {
    float below[ROW];
    if (base.data && from.dtype == BF16 && base.dtype == BF16) { /* in one go */
        const uint16_t *raw = (const uint16_t *)from.data + start, *under = (const uint16_t *)base.data + start;
        for (size_t i = 0; i < count; i++) to[i] = of_bits((uint32_t)raw[i] << 16) - of_bits((uint32_t)under[i] << 16);
        return;
    }
    if (base.data) load(below, base.data, base.dtype, start, count);
    load_vector(to, from, base.data ? below : NULL, start, count);
}

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

INLINE size_t block_at(size_t start, size_t entries, size_t most) { return entries - start < most ? entries - start : most; }

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

/* ---- the boundary of the k largest magnitudes, by the bits of |delta|: those of positive floats order as the floats do */

#define LANES 4 /* histograms side by side: equal digits that follow each other need not wait */

/* Count, in one row of so many, the higher 16 bits of every magnitude; or the lower ones, of those whose higher bits are
   `high`. */
API WIDE void count_digits(
    size_t entries, tensor input, tensor base, size_t every, int64_t high /* -1: count the higher ones */,
    uint32_t *restrict lanes /* [LANES][1 << 16] */
) {
    float one[ROW];
    uint32_t bits[ROW];
    for (size_t start = 0; start < entries; start += ROW * every) {
        size_t count = block_at(start, entries, ROW);
        load_delta(one, input, base, start, count);
        for (size_t i = 0; i < count; i++) bits[i] = bits_of(one[i]) & 0x7fffffffu;
        if (high < 0) {
            for (size_t i = 0; i < count; i++) lanes[((i % LANES) << 16) | bits[i] >> 16]++;
        } else {
            size_t found = 0;
            for (size_t i = 0; i < count; i++) { /* without a branch that would be mispredicted */
                uint32_t now = bits[i];
                bits[found] = now & 0xffffu;
                found += now >> 16 == (uint32_t)high;
            }
            for (size_t i = 0; i < found; i++) lanes[((i % LANES) << 16) | bits[i]]++;
        }
    }
}

/* Find the bin of the wanted-th largest: found = {its digit, how many lie above it, how many in it}. */
API void find_digit(const uint32_t *lanes, int64_t wanted, int64_t found[3]) {
    int64_t above = 0;
    for (int64_t digit = (1 << 16) - 1; digit >= 0; digit--) {
        int64_t here = 0;
        for (int lane = 0; lane < LANES; lane++) here += lanes[(lane << 16) | digit];
        if (above + here >= wanted || digit == 0) {
            found[0] = digit, found[1] = above, found[2] = here;
            return;
        }
        above += here;
    }
}

#ifdef MASKS
MASKS static size_t compressed(const uint32_t *bits, uint32_t low, uint32_t high, size_t count, uint32_t *where) {
    __m512i lowest = _mm512_set1_epi32((int)low), width = _mm512_set1_epi32((int)(high - low));
    __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    size_t found = 0;
    for (size_t i = 0; i < count; i += 16) {
        __mmask16 there = (__mmask16)(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
        __m512i now = _mm512_maskz_loadu_epi32(there, bits + i);
        __mmask16 marks = _mm512_mask_cmplt_epu32_mask(there, _mm512_sub_epi32(now, lowest), width);
        _mm512_storeu_si512(where + found, _mm512_maskz_compress_epi32(marks, place)); /* what is beyond them is overwritten */
        found += (size_t)__builtin_popcount(marks);
        place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
    }
    return found;
}
#endif

/* Find the entries of a block whose bits lie in [low, high): their positions in it, ascending; gives how many there are. */
INLINE size_t within(const uint32_t *restrict bits, uint32_t low, uint32_t high, size_t count, uint32_t *restrict where) {
#ifdef MASKS
    if (HAS_MASKS) return compressed(bits, low, high, count, where);
#endif
    uint8_t marks[BLOCK];
    size_t total = 0, found = 0;
    for (size_t i = 0; i < count; i++) marks[i] = bits[i] - low < high - low;
    for (size_t i = count; i < BLOCK; i++) marks[i] = 0;
    for (size_t i = 0; i < BLOCK; i++) total += marks[i];
    if (!total) return 0;
    size_t step = total < count / 16 ? 8 : BLOCK; /* where few are wanted, what has none of them is passed over */
    for (size_t i = 0; i < count; i += step) {
        uint64_t any = 1;
        if (step == 8) memcpy(&any, marks + i, 8);
        if (!any) continue;
        size_t last = count - i < step ? count : i + step;
        for (size_t k = i; k < last; k++) { /* without a branch that would be mispredicted */
            where[found] = (uint32_t)k;
            found += marks[k];
        }
    }
    return found;
}

/* Keep the bits of the magnitudes in [low, high) of the entries from `start` to `stop`, and add up how many are above. */
INLINE int64_t sift_rows(
    size_t start, size_t stop, tensor input, tensor base, uint32_t low, uint32_t high, uint32_t *kept, size_t room,
    int64_t *above
) {
    float one[BLOCK];
    uint32_t bits[BLOCK], where[BLOCK + 16];
    size_t total = 0;
    int64_t larger = 0;
    for (; start < stop; start += BLOCK) {
        size_t count = block_at(start, stop, BLOCK);
        load_delta(one, input, base, start, count);
        uint32_t here = 0;
        for (size_t i = 0; i < count; i++) {
            bits[i] = bits_of(one[i]) & 0x7fffffffu;
            here += bits[i] >= high;
        }
        larger += here;
        size_t found = within(bits, low, high, count, where);
        if (total + found > room) return -1;
        for (size_t i = 0; i < found; i++) kept[total + i] = bits[where[i]];
        total += found;
    }
    *above += larger;
    return (int64_t)total;
}

/* Gives how many were kept, -1 where they are more than there is room for. */
API WIDE int64_t sift(
    size_t entries, tensor input, tensor base, uint32_t low, uint32_t high, uint32_t *kept, size_t room, int64_t *above
) {
    return sift_rows(0, entries, input, base, low, high, kept, room, above);
}

/* The same for each block of GRID entries, with room for all: how many of it were kept, and how many are above. */
API WIDE void sift_blocks(
    size_t entries, tensor input, tensor base, uint32_t low, uint32_t high, uint32_t *kept, int64_t *sizes, int64_t *above
) {
    for (size_t start = 0; start < entries; start += GRID) {
        size_t stop = entries - start < GRID ? entries : start + GRID;
        *above = 0;
        *sizes = sift_rows(start, stop, input, base, low, high, kept, GRID, above++);
        kept += *sizes++;
    }
}

/* Of bits that were kept of blocks, count for each block what is above a boundary, adding it up, and what is on it. */
API WIDE void count_around(
    size_t blocks, const uint32_t *bits, const int64_t *sizes, uint32_t boundary, int64_t *above, int64_t *equal
) {
    for (size_t block = 0; block < blocks; block++) {
        uint32_t larger = 0, same = 0;
        for (int64_t i = 0; i < sizes[block]; i++) {
            larger += bits[i] > boundary;
            same += bits[i] == boundary;
        }
        above[block] += larger, equal[block] = same;
        bits += sizes[block];
    }
}

/* Take from a run that begins at a block of GRID the entries above a boundary, and of those on it the first ones of each
   block: so many as `ties` says. Of all taken, leave out the first `skip` and write the next, at most `most`: their
   positions from `index` on where `values` is no place, else their values. Gives how many were written. */
API WIDE size_t take_selected(
    size_t entries, tensor input, tensor base, uint32_t boundary, const int64_t *ties, int64_t index, size_t skip,
    size_t most, int64_t *positions, float *values
) {
    float one[BLOCK];
    uint32_t bits[BLOCK], where[BLOCK + 16];
    size_t written = 0;
    int64_t left = 0;
    for (size_t start = 0; start < entries && written < most; start += BLOCK) {
        size_t count = block_at(start, entries, BLOCK), found = 0;
        if (start % GRID == 0) left = ties[start / GRID];
        load_delta(one, input, base, start, count);
        for (size_t i = 0; i < count; i++) bits[i] = bits_of(one[i]) & 0x7fffffffu;
        size_t all = within(bits, left > 0 ? boundary : boundary + 1, 0x80000000u, count, where);
        if (left > 0) {
            for (size_t i = 0; i < all; i++) {
                int same = bits[where[i]] == boundary, kept = !same | (left > 0);
                left -= same & kept;
                where[found] = where[i];
                found += (size_t)kept;
            }
            all = found;
        }
        size_t first = skip < all ? skip : all, last = all - first > most - written ? first + most - written : all;
        skip -= first;
        if (values)
            for (size_t i = first; i < last; i++) values[written++] = one[where[i]];
        else
            for (size_t i = first; i < last; i++) positions[written++] = index + (int64_t)(start + where[i]);
    }
    return written;
}

/* Find the wanted-th largest of these bits: found = {it, how many are larger, how many are equal}. */
API void find_among(const uint32_t *bits, size_t count, int64_t wanted, uint32_t *lanes, int64_t found[3]) {
    int64_t higher[3];
    memset(lanes, 0, (LANES << 16) * sizeof *lanes);
    for (size_t i = 0; i < count; i++) lanes[((i % LANES) << 16) | bits[i] >> 16]++;
    find_digit(lanes, wanted, higher);
    memset(lanes, 0, (LANES << 16) * sizeof *lanes);
    for (size_t i = 0; i < count; i++)
        if (bits[i] >> 16 == (uint32_t)higher[0]) lanes[((i % LANES) << 16) | (bits[i] & 0xffffu)]++;
    find_digit(lanes, wanted - higher[1], found);
    found[0] |= higher[0] << 16;
    found[1] += higher[1];
}

/* The position of the ordinal-th entry (from 1) of exactly this magnitude; -(how many there are) - 1 where there are fewer. */
API WIDE int64_t find_equal(size_t entries, tensor input, tensor base, float value, int64_t ordinal) {
    float one[BLOCK];
    int64_t passed = 0;
    for (size_t start = 0; start < entries; start += BLOCK) {
        size_t count = block_at(start, entries, BLOCK);
        int64_t here = 0;
        load_delta(one, input, base, start, count);
        for (size_t i = 0; i < count; i++) here += fabsf(one[i]) == value;
        if (passed + here >= ordinal)
            for (size_t i = 0; i < count; i++)
                if (fabsf(one[i]) == value && ++passed == ordinal) return (int64_t)(start + i);
        passed += here;
    }
    return -passed - 1;
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
