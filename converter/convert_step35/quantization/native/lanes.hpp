// Vectors with one block in each lane, and the few operations that quantizers need of them.
//
// Arithmetic is plain IEEE, operation by operation: that is what makes the bytes equal libggml's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined __x86_64__
#include <immintrin.h>
#endif

#ifndef LANES
#error "compile with -DLANES=4, 8 or 16"
#endif

// A namespace of its own for each width: the linker must not merge functions of different instruction sets.
namespace {

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

inline F absolute(F x) { return (F)((I)x & 0x7fffffff); }
inline F to_float(I x) { return __builtin_convertvector(x, F); }

// An instruction for each bound, which compilers do not make of the comparisons.
inline I clamp(I x, int low, int high) {
#if LANES == 16 && defined __AVX512F__
    return (I)_mm512_max_epi32(_mm512_min_epi32((__m512i)x, _mm512_set1_epi32(high)), _mm512_set1_epi32(low));
#elif LANES == 8 && defined __AVX2__
    return (I)_mm256_max_epi32(_mm256_min_epi32((__m256i)x, _mm256_set1_epi32(high)), _mm256_set1_epi32(low));
#else
    x = x < high ? x : high;
    return x > low ? x : low;
#endif
}

inline F clamp(F x, float low, float high) {
#if LANES == 16 && defined __AVX512F__
    return (F)_mm512_max_ps(_mm512_min_ps((__m512)x, _mm512_set1_ps(high)), _mm512_set1_ps(low));
#elif LANES == 8 && defined __AVX2__
    return (F)_mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(high)), _mm256_set1_ps(low));
#elif LANES == 4 && defined __x86_64__
    return (F)_mm_max_ps(_mm_min_ps((__m128)x, _mm_set1_ps(high)), _mm_set1_ps(low));
#else
    x = x < high ? x : high;
    return x > low ? x : low;
#endif
}

// Round to nearest, ties to even, where |x| <= 2^22; the sign of a zero is open.
inline F nearest_float(F x) {
#if LANES == 16 && defined __AVX512F__
    return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES == 8 && defined __AVX2__
    return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    return (x + 12582912.f) - 12582912.f;
#endif
}

// Round to nearest, ties to even, by the bits of x + 1.5 * 2^23; wraps beyond 2^22 as libggml's does.
inline I nearest(F x) { return ((I)(x + 12582912.f) & 0x007fffff) - 0x00400000; }

// a[0] b[0] a[1] b[1] ... of the lower halves, and of the upper halves; with 8 lanes, of the halves of each half.
#if LANES == 8 && defined __AVX2__
inline void interleave(I a, I b, I &lower, I &upper) {
    lower = (I)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
    upper = (I)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
}
#else
#if LANES == 16
#define LOWER_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOWER_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER_HALVES 0, 4, 1, 5
#define UPPER_HALVES 2, 6, 3, 7
#endif
inline void interleave(I a, I b, I &lower, I &upper) {
#if defined __clang__
    lower = __builtin_shufflevector(a, b, LOWER_HALVES);
    upper = __builtin_shufflevector(a, b, UPPER_HALVES);
#else
    lower = __builtin_shuffle(a, b, (I){LOWER_HALVES});
    upper = __builtin_shuffle(a, b, (I){UPPER_HALVES});
#endif
}
#endif

// Turns SIZE vectors of SIZE words around: a shuffle of both halves turns the bits of a word's index by one.
template <int SIZE>
inline void shuffle(I *words) {
    for (int width = 1; width < SIZE; width *= 2) {
        I turned[SIZE];
        for (int i = 0; i < SIZE / 2; i++)
            interleave(words[i], words[i + SIZE / 2], turned[2 * i], turned[2 * i + 1]);
        memcpy(words, turned, sizeof turned);
    }
}

// Word j of vector i goes to word i of vector j.
inline void transpose(I *words) {
#if LANES == 8 && defined __AVX2__
    // Shuffles are cheap within a half: first the quarters of the square get their places, then each is turned.
    for (int i = 0; i < 4; i++) {
        const __m256i a = (__m256i)words[i], b = (__m256i)words[i + 4];
        words[i] = (I)_mm256_permute2x128_si256(a, b, 0x20);
        words[i + 4] = (I)_mm256_permute2x128_si256(a, b, 0x31);
    }
    shuffle<4>(words);
    shuffle<4>(words + 4);
#else
    shuffle<LANES>(words);
#endif
}

inline bool any(I mask) {
#if LANES == 16 && defined __AVX512F__
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8 && defined __AVX2__
    return _mm256_movemask_epi8((__m256i)mask) != 0;
#endif
    int found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= mask[lane];
    return found != 0;
}

inline F root(F x) {
#if LANES == 16 && defined __AVX512F__
    return (F)_mm512_sqrt_ps((__m512)x);
#elif LANES == 8 && defined __AVX2__
    return (F)_mm256_sqrt_ps((__m256)x);
#else
    for (int lane = 0; lane < LANES; lane++) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
#endif
}

// The bits of x as float16, rounded to nearest even; every NaN becomes 0x7e00.
inline I to_half(F x) {
    U twice = (U)x + (U)x, exponent = twice & 0xff000000u;
    exponent = exponent < 0x71000000u ? (U){} + 0x71000000u : exponent;
    F base = (absolute(x) * 0x1p112f) * 0x1p-110f;
    U rounded = (U)((F)((exponent >> 1) + 0x07800000u) + base);
    U magnitude = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
    return (I)((((U)x & 0x80000000u) >> 16) | (twice > 0xff000000u ? (U){} + 0x7e00u : magnitude));
}

// The value of float16 bits.
inline F from_half(I half) {
    U bits = (U)half << 16, twice = bits + bits;
    F normal = (F)((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
    F denormal = (F)((twice >> 17) | (126u << 23)) - 0.5f;
    return (F)((bits & 0x80000000u) | (twice < (1u << 27) ? (U)denormal : (U)normal));
}

}  // namespace
