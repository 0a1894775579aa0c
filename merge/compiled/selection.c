/* The boundary of the k largest magnitudes, and the entries beyond it, by the bits of |delta|: those of positive floats
   order as the floats do. Over stored bytes, as merge/compiled/measures.py and the sparse extraction ask for them. */

#include "stored.h"

#define GRID 65536 /* merge/evaluate.py has the same */
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
