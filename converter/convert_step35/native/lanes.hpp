// Vectors with one block in each lane, and the few operations that quantizers need of them.
//
// Arithmetic is plain IEEE, operation by operation: that is what makes the bytes equal libggml's.
#pragma once

#include <cstdint>
#include <cstring>

#if defined __AVX2__
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
inline I clamp(I x, int low, int high) { x = x < high ? x : high; return x > low ? x : low; }
inline F clamp(F x, float low, float high) { x = x < high ? x : high; return x > low ? x : low; }

// Round to nearest, ties to even, by the bits of x + 1.5 * 2^23; wraps beyond 2^22 as libggml's does.
inline I nearest(F x) { return ((I)(x + 12582912.f) & 0x007fffff) - 0x00400000; }

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
