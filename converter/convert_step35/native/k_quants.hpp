// Q4_K and Q5_K: super-blocks of 256 weights, each lane one of them.
//
// A format has N weights and BYTES bytes, and `quantize` from x[N] and, with an imatrix, importance[N] (else null)
// to bytes[BYTES], a byte a lane. Where a block's own scale rounds to zero, its levels stay those of the search.
#pragma once

#include "search.hpp"

namespace {

inline F sum_of_squares(const F *x, int n) {
    F sum = {};
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

// weight = importance * sqrt(sigma^2 + x^2); returns the sum of the weights.
inline F importance_weights(const F *x, const F *importance, F sigma2, int n, F *weight) {
    F sum = {};
    for (int i = 0; i < n; i++) {
        weight[i] = importance[i] * root(sigma2 + x[i] * x[i]);
        sum += weight[i];
    }
    return sum;
}

inline void put_half(I *bytes, I half) {
    bytes[0] = half & 0xff;
    bytes[1] = half >> 8;
}

inline F largest(const F *values, int n) {
    F max = {};
    for (int i = 0; i < n; i++) max = values[i] > max ? values[i] : max;
    return max;
}

// Eight 6-bit scales and mins in 12 bytes.
inline void pack_scales(const I *scale, const I *min, I *bytes) {
    for (int j = 0; j < 4; j++) {
        bytes[j] = scale[j];
        bytes[j + 4] = min[j];
    }
    for (int j = 4; j < 8; j++) {
        bytes[j + 4] = (scale[j] & 0xf) | (min[j] & 0xf) << 4;
        bytes[j - 4] = (bytes[j - 4] | scale[j] >> 4 << 6) & 0xff;
        bytes[j] = (bytes[j] | min[j] >> 4 << 6) & 0xff;
    }
}

inline I packed_scale(const I *bytes, int j) {
    return j < 4 ? bytes[j] & 63 : (bytes[j + 4] & 0xf) | bytes[j - 4] >> 6 << 4;
}

inline I packed_min(const I *bytes, int j) {
    return j < 4 ? bytes[j + 4] & 63 : bytes[j + 4] >> 4 | bytes[j] >> 6 << 4;
}

// The head of Q4_K and Q5_K: d, dmin and scales; and the 256 levels.
template <int TOP>
struct AffineBlocks {
    Affine fits[8];
    I levels[256];

    void quantize(const F *x, const F *importance, Steps plain, I *bytes) {
        importance != nullptr ? fit_important(x, importance, bytes) : fit_plain(x, plain, bytes);
        set_levels(x, bytes);
    }

    void fit_plain(const F *x, Steps steps, I *bytes) {
        F weight[32], scales[8], mins[8];
        for (int j = 0; j < 8; j++) {
            const F *block = x + 32 * j;
            F mean = root(sum_of_squares(block, 32) / 32);
            for (int i = 0; i < 32; i++) weight[i] = mean + absolute(block[i]);
            fits[j] = fit_affine<32, TOP>(block, weight, steps);
            scales[j] = fits[j].scale;
            mins[j] = -fits[j].min;
        }
        F max_scale = largest(scales, 8), max_min = largest(mins, 8);
        F to_scale = max_scale > 0 ? 63.f / max_scale : (F){}, to_min = max_min > 0 ? 63.f / max_min : (F){};
        I scale_levels[8], min_levels[8];
        for (int j = 0; j < 8; j++) {
            scale_levels[j] = clamp(nearest(to_scale * scales[j]) & 0xff, 0, 63);
            min_levels[j] = clamp(nearest(to_min * mins[j]) & 0xff, 0, 63);
        }
        put_half(bytes, to_half(max_scale / 63.f));
        put_half(bytes + 2, to_half(max_min / 63.f));
        pack_scales(scale_levels, min_levels, bytes + 4);
    }

    void fit_important(const F *x, const F *importance, I *bytes) {
        F weight[32], scales[8], mins[8], sums[8];
        F sigma2 = 2 * sum_of_squares(x, 256) / 256;
        for (int j = 0; j < 8; j++) {
            sums[j] = importance_weights(x + 32 * j, importance + 32 * j, sigma2, 32, weight);
            fits[j] = fit_affine<32, TOP>(x + 32 * j, weight, {-0.9f, 0.05f, 36});
            scales[j] = fits[j].scale;
            mins[j] = -fits[j].min;
        }
        I scale_levels[8], min_levels[8];
        put_half(bytes, to_half(fit_positive<8, 63>(scales, sums, scale_levels)));
        put_half(bytes + 2, to_half(fit_positive<8, 63>(mins, sums, min_levels)));
        if (TOP == 31) {
            for (int j = 0; j < 8; j++) {
                scale_levels[j] = clamp(scale_levels[j], 0, 63);
                min_levels[j] = clamp(min_levels[j], 0, 63);
            }
        }
        pack_scales(scale_levels, min_levels, bytes + 4);
    }

    void set_levels(const F *x, const I *bytes) {
        F d = from_half(bytes[0] | bytes[1] << 8), dmin = from_half(bytes[2] | bytes[3] << 8);
        for (int j = 0; j < 8; j++) {
            F scale = d * to_float(packed_scale(bytes + 4, j)), min = dmin * to_float(packed_min(bytes + 4, j));
            const F *block = x + 32 * j;
            for (int i = 0; i < 32; i++) levels[32 * j + i] = clamp(nearest((block[i] + min) / scale), 0, TOP);
            I zero = scale == 0;
            if (any(zero))
                for (int i = 0; i < 32; i++)
                    levels[32 * j + i] = zero ? level<TOP>(block[i], fits[j].inverse, fits[j].base) : levels[32 * j + i];
        }
    }
};

struct Q4_K {
    static constexpr int N = 256, BYTES = 144;

    static void quantize(const F *x, const F *importance, I *bytes) {
        AffineBlocks<15> blocks;
        blocks.quantize(x, importance, {-1.f, 0.1f, 20}, bytes);
        const I *l = blocks.levels;
        for (int i = 0; i < 128; i++) bytes[16 + i] = l[i / 32 * 64 + i % 32] | l[i / 32 * 64 + 32 + i % 32] << 4;
    }
};

}  // namespace
