/* Stored bytes of fp32, bf16 and fp16, loaded as fp32 and stored again a block at a time; what all kernels share. */

#ifndef STORED_H
#define STORED_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ROW 4096 /* merge/kernels.py has the same */
#define BLOCK 1024 /* entries that are worked on at once, so that all that is made of them stays in the nearest cache */

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

enum dtype { F32, BF16, F16 }; /* library.py has the same numbers */

typedef struct {
    const void *data; /* of the entries that are worked on */
    int32_t dtype;
} tensor;

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

INLINE size_t block_at(size_t start, size_t entries, size_t most) { return entries - start < most ? entries - start : most; }

#endif
