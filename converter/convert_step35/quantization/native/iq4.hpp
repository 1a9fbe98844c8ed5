// IQ4_NL and IQ4_XS: levels that are indexes of 16 unevenly spaced values.
#pragma once

#include "formats.hpp"

namespace {

// kvalues_iq4nl, and half way between them: x goes to the upper value from there on.
constexpr float VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float middle(int i) { return (VALUES[i] + VALUES[i + 1]) / 2; }

// table[index]; an index is below 8.
inline F lookup(const float *table, I index) {
#if LANES == 16 && defined __AVX512F__
    return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
#elif LANES == 8 && defined __AVX2__
    return (F)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
    F found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = table[index[lane]];
    return found;
#endif
}

inline F value_of(I index) {
#if LANES == 16 && defined __AVX512F__
    return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(VALUES));
#else
    return index > 7 ? lookup(VALUES + 8, index & 7) : lookup(VALUES, index & 7);
#endif
}

// best_index_int8: four comparisons, each with the middle that the ones before it leave. NaN goes to the top.
inline I nearest_value(F x) {
    static constexpr float second[8] = {middle(3), middle(11)};
    static constexpr float third[8] = {middle(1), middle(5), middle(9), middle(13)};
    static constexpr float fourth[8] = {middle(0), middle(2),  middle(4),  middle(6),
                                        middle(8), middle(10), middle(12), middle(14)};
    I index = x < middle(7) ? (I){} : (I){} + 1;
    index = x < lookup(second, index) ? index + index : index + index + 1;
    index = x < lookup(third, index) ? index + index : index + index + 1;
    return x < lookup(fourth, index) ? index + index : index + index + 1;
}

// The scale of a block of 32, by the search of quantize_row_iq4_nl_impl.
inline F fit_values(const F *x, const F *weight) {
    F max, distance, scale = {}, best = {};
    farthest(x, 32, max, distance);
    for (int step = -8; step <= 7; step++) {
        // The first try is the plain one, by the inverse of the scale.
        F inverse = step == -8 ? 1 / (-max / VALUES[0]) : (step + VALUES[0]) / max, sum_xq = {}, sum_q2 = {};
        for (int i = 0; i < 32; i++) {
            F q = value_of(nearest_value(inverse * x[i])), wq = weight[i] * q;
            sum_xq += wq * x[i];
            sum_q2 += wq * q;
        }
        I better = (sum_q2 > 0) & (step == -8 ? sum_q2 > 0 : sum_xq * sum_xq > best * sum_q2);
        scale = better ? sum_xq / sum_q2 : scale;
        best = better ? scale * sum_xq : best;
    }
    return distance < SMALLEST ? (F){} : scale;
}

inline void value_weights(const F *x, const F *importance, F sigma2, F *weight) {
    if (importance != nullptr)
        importance_weights(x, importance, sigma2, 32, weight);
    else
        for (int i = 0; i < 32; i++) weight[i] = x[i] * x[i];
}

// Nibbles of x / scale: two from 16 weights apart in a byte.
inline void put_values(const F *x, F scale, I *bytes) {
    const F inverse = scale != 0 ? 1 / scale : (F){};
    for (int i = 0; i < 16; i++)
        bytes[i] = nearest_value(inverse * x[i]) | nearest_value(inverse * x[i + 16]) << 4;
}

// The 32 weights of those.
inline void restore_values(const I *bytes, F scale, F *x) {
    for (int i = 0; i < 16; i++) {
        x[i] = scale * value_of(bytes[i] & 15);
        x[i + 16] = scale * value_of(bytes[i] >> 4);
    }
}

struct IQ4_NL {
    static constexpr int N = 32, BYTES = 18;

    static void restore(const I *bytes, F *x) { restore_values(bytes + 2, half_at(bytes), x); }

    static void quantize(const F *x, const F *importance, I *bytes) {
        F weight[32];
        value_weights(x, importance, sum_of_squares(x, 32) * (2.f / 32), weight);
        const F scale = fit_values(x, weight);
        put_half(bytes, to_half(scale));
        put_values(x, scale, bytes + 2);
    }
};

struct IQ4_XS {
    static constexpr int N = 256, BYTES = 136;

    static void restore(const I *bytes, F *x) {
        const F d = half_at(bytes);
        const I high = bytes[2] | bytes[3] << 8;
        for (int j = 0; j < 8; j++) {
            const I level = (bytes[4 + j / 2] >> j % 2 * 4 & 15) | (high >> 2 * j & 3) << 4;
            restore_values(bytes + 8 + 16 * j, d * to_float(level - 32), x + 32 * j);
        }
    }

    static void quantize(const F *x, const F *importance, I *bytes) {
        F scales[8], weight[32], max, distance;
        const F sigma2 = sum_of_squares(x, 256) * (2.f / 256);
        for (int j = 0; j < 8; j++) {
            value_weights(x + 32 * j, importance != nullptr ? importance + 32 * j : nullptr, sigma2, weight);
            scales[j] = fit_values(x + 32 * j, weight);
        }
        farthest(scales, 8, max, distance);
        const F d = -max / 32.f, inverse = d != 0 ? 1 / d : (F){};
        put_half(bytes, to_half(d));
        I low[8], high = {};
        for (int j = 0; j < 8; j++) {
            I l = clamp(nearest(inverse * scales[j]), -32, 31);
            put_values(x + 32 * j, d * to_float(l), bytes + 8 + 16 * j);
            low[j] = l + 32 & 15;
            high |= l + 32 >> 4 << 2 * j;
        }
        put_half(bytes + 2, high);
        for (int j = 0; j < 4; j++) bytes[4 + j] = low[2 * j] | low[2 * j + 1] << 4;
    }
};

}  // namespace
