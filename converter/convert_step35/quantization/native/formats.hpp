// ggml's formats, each from lanes to lanes.
//
// A format has N weights and BYTES bytes in a block, `quantize` from x[N] and importance[N], null without an imatrix,
// to bytes[BYTES], a byte a lane, and `restore` from bytes to x. Where a scale rounds to zero, ggml keeps the levels of
// the search.
#pragma once

#include "search.hpp"

namespace {

inline void put_half(I *bytes, I half) {
    bytes[0] = half & 0xff;
    bytes[1] = half >> 8 & 0xff;
}

inline F half_at(const I *bytes) { return from_half(bytes[0] | bytes[1] << 8); }

// 256 levels of 2 bits: four from 32 weights apart in a byte.
inline void pack_2_bits(const I *levels, I *bytes) {
    for (int i = 0; i < 64; i++) {
        const I *l = levels + i / 32 * 128 + i % 32;
        bytes[i] = (l[0] & 3) | (l[32] & 3) << 2 | (l[64] & 3) << 4 | (l[96] & 3) << 6;
    }
}

inline void unpack_2_bits(const I *bytes, I *levels) {
    for (int i = 0; i < 64; i++) {
        I *l = levels + i / 32 * 128 + i % 32;
        l[0] = bytes[i] & 3;
        l[32] = bytes[i] >> 2 & 3;
        l[64] = bytes[i] >> 4 & 3;
        l[96] = bytes[i] >> 6;
    }
}

// 256 levels of 4 bits: two from 32 weights apart in a byte.
inline void pack_4_bits(const I *levels, I *bytes) {
    for (int i = 0; i < 128; i++) {
        const I *l = levels + i / 32 * 64 + i % 32;
        bytes[i] = (l[0] & 15) | (l[32] & 15) << 4;
    }
}

inline void unpack_4_bits(const I *bytes, I *levels) {
    for (int i = 0; i < 128; i++) {
        I *l = levels + i / 32 * 64 + i % 32;
        l[0] = bytes[i] & 15;
        l[32] = bytes[i] >> 4;
    }
}

// One bit more for 256 levels, above `SHIFT` others: eight from 32 weights apart in a byte.
template <int SHIFT>
inline void add_bits(const I *bytes, I *levels) {
    for (int i = 0; i < 32; i++)
        for (int j = 0; j < 8; j++) levels[32 * j + i] |= (bytes[i] >> j & 1) << SHIFT;
}

inline F largest(const F *values, int n) {
    F max = {};
    for (int i = 0; i < n; i++) max = values[i] > max ? values[i] : max;
    return max;
}

// x ~ d * scale * level - dmin * min, in blocks of SIZE with levels 0 ... TOP.
template <int SIZE, int TOP>
struct AffineBlocks {
    static constexpr int COUNT = 256 / SIZE, AT_ONCE = 4;
    Affine fits[COUNT];
    F scales[COUNT], mins[COUNT], weight_sums[COUNT];
    I levels[256];

    // Fits AT_ONCE blocks from j on; `weight` holds theirs.
    template <bool ABSOLUTE = false>
    void fit(int j, const F *x, const F *weight, Steps steps) {
        fit_affine<AT_ONCE, SIZE, TOP, ABSOLUTE>(x + SIZE * j, weight, steps, fits + j);
        for (int k = j; k < j + AT_ONCE; k++) {
            scales[k] = fits[k].scale;
            mins[k] = -fits[k].min;
        }
    }

    void fit_important(const F *x, const F *importance, F sigma2) {
        F weight[AT_ONCE * SIZE];
        for (int j = 0; j < COUNT; j += AT_ONCE) {
            for (int k = 0; k < AT_ONCE; k++) {
                const int at = SIZE * (j + k);
                weight_sums[j + k] = importance_weights(x + at, importance + at, sigma2, SIZE, weight + SIZE * k);
            }
            fit(j, x, weight, {-0.9f, 0.05f, 36});
        }
    }

    void set_levels(const F *x, F d, F dmin, const I *scale_levels, const I *min_levels) {
        for (int j = 0; j < COUNT; j++) {
            const F *block = x + SIZE * j, scale = d * to_float(scale_levels[j]), min = dmin * to_float(min_levels[j]);
            I *l = levels + SIZE * j;
            for (int i = 0; i < SIZE; i++) l[i] = clamp(nearest((block[i] + min) / scale), 0, TOP);
            const I zero = scale == 0;
            if (!any(zero)) continue;
            for (int i = 0; i < SIZE; i++) l[i] = zero ? level<TOP>(block[i], fits[j].inverse, fits[j].base) : l[i];
        }
    }
};

// The first 16 bytes of Q4_K and Q5_K: d, dmin, and eight scales and mins of 6 bits.
template <int TOP>
struct SixBitScales : AffineBlocks<32, TOP> {
    using Blocks = AffineBlocks<32, TOP>;

    void quantize(const F *x, const F *importance, Steps plain, I *bytes) {
        I scale_levels[8], min_levels[8];
        if (importance != nullptr)
            scale_important(x, importance, bytes, scale_levels, min_levels);
        else
            scale_plain(x, plain, bytes, scale_levels, min_levels);
        pack(scale_levels, min_levels, bytes + 4);
        unpack(bytes + 4, scale_levels, min_levels);
        Blocks::set_levels(x, half_at(bytes), half_at(bytes + 2), scale_levels, min_levels);
    }

    void scale_plain(const F *x, Steps steps, I *bytes, I *scale_levels, I *min_levels) {
        F weight[32 * Blocks::AT_ONCE];
        for (int j = 0; j < 8; j += Blocks::AT_ONCE) {
            for (int k = 0; k < Blocks::AT_ONCE; k++) {
                const F *block = x + 32 * (j + k), mean = root(sum_of_squares(block, 32) / 32);
                for (int i = 0; i < 32; i++) weight[32 * k + i] = mean + absolute(block[i]);
            }
            Blocks::fit(j, x, weight, steps);
        }
        put_half(bytes, scale_by_largest(this->scales, scale_levels));
        put_half(bytes + 2, scale_by_largest(this->mins, min_levels));
    }

    static I scale_by_largest(const F *values, I *value_levels) {
        F max = largest(values, 8), inverse = max > 0 ? 63.f / max : (F){};
        for (int j = 0; j < 8; j++) value_levels[j] = clamp(nearest(inverse * values[j]) & 0xff, 0, 63);
        return to_half(max / 63.f);
    }

    void scale_important(const F *x, const F *importance, I *bytes, I *scale_levels, I *min_levels) {
        Blocks::fit_important(x, importance, 2 * sum_of_squares(x, 256) / 256);
        put_half(bytes, to_half(fit_positive<8, 63>(this->scales, this->weight_sums, scale_levels)));
        put_half(bytes + 2, to_half(fit_positive<8, 63>(this->mins, this->weight_sums, min_levels)));
        if (TOP == 15) return;  // ggml bounds them for Q5_K alone
        for (int j = 0; j < 8; j++) {
            scale_levels[j] = clamp(scale_levels[j], 0, 63);
            min_levels[j] = clamp(min_levels[j], 0, 63);
        }
    }

    // x = d * scale * level - dmin * min.
    static void restore(const I *bytes, const I *levels, F *x) {
        const F d = half_at(bytes), dmin = half_at(bytes + 2);
        I scales[8], mins[8];
        unpack(bytes + 4, scales, mins);
        for (int j = 0; j < 8; j++) {
            const F scale = d * to_float(scales[j]), min = dmin * to_float(mins[j]);
            for (int i = 32 * j; i < 32 * j + 32; i++) x[i] = scale * to_float(levels[i]) - min;
        }
    }

    static void pack(const I *scale, const I *min, I *bytes) {
        for (int j = 0; j < 4; j++) {
            bytes[j] = (scale[j] | scale[j + 4] >> 4 << 6) & 0xff;
            bytes[j + 4] = (min[j] | min[j + 4] >> 4 << 6) & 0xff;
            bytes[j + 8] = (scale[j + 4] & 15) | (min[j + 4] & 15) << 4;
        }
    }

    static void unpack(const I *bytes, I *scale, I *min) {
        for (int j = 0; j < 4; j++) {
            scale[j] = bytes[j] & 63;
            min[j] = bytes[j + 4] & 63;
            scale[j + 4] = (bytes[j + 8] & 15) | bytes[j] >> 6 << 4;
            min[j + 4] = bytes[j + 8] >> 4 | bytes[j + 4] >> 6 << 4;
        }
    }
};

struct Q4_K {
    static constexpr int N = 256, BYTES = 144;

    static void quantize(const F *x, const F *importance, I *bytes) {
        SixBitScales<15> blocks;
        blocks.quantize(x, importance, {-1.f, 0.1f, 20}, bytes);
        pack_4_bits(blocks.levels, bytes + 16);
    }

    static void restore(const I *bytes, F *x) {
        I levels[256];
        unpack_4_bits(bytes + 16, levels);
        SixBitScales<15>::restore(bytes, levels, x);
    }
};

struct Q5_K {
    static constexpr int N = 256, BYTES = 176;

    static void quantize(const F *x, const F *importance, I *bytes) {
        SixBitScales<31> blocks;
        blocks.quantize(x, importance, {-0.5f, 0.1f, 15}, bytes);
        for (int i = 0; i < 32; i++) {
            bytes[16 + i] = (I){};
            for (int j = 0; j < 8; j++) bytes[16 + i] |= blocks.levels[32 * j + i] >> 4 << j;
        }
        pack_4_bits(blocks.levels, bytes + 48);
    }

    static void restore(const I *bytes, F *x) {
        I levels[256];
        unpack_4_bits(bytes + 48, levels);
        add_bits<4>(bytes + 16, levels);
        SixBitScales<31>::restore(bytes, levels, x);
    }
};

struct Q2_K {
    static constexpr int N = 256, BYTES = 84;

    static void quantize(const F *x, const F *importance, I *bytes) {
        AffineBlocks<16, 3> blocks;
        I scales[16], mins[16], *d = bytes + 80, *dmin = bytes + 82;
        if (importance != nullptr) {
            blocks.fit_important(x, importance, sum_of_squares(x, 256) / 256);
            put_half(d, to_half(fit_positive<16, 15>(blocks.scales, blocks.weight_sums, scales)));
            put_half(dmin, to_half(fit_positive<16, 15>(blocks.mins, blocks.weight_sums, mins)));
        } else {
            fit_plain(x, blocks);
            put_half(d, scale_by_largest(blocks.scales, scales));
            put_half(dmin, scale_by_largest(blocks.mins, mins));
        }
        for (int j = 0; j < 16; j++) {
            bytes[j] = (scales[j] | mins[j] << 4) & 0xff;
            scales[j] = bytes[j] & 15;
            mins[j] = bytes[j] >> 4;
        }
        blocks.set_levels(x, half_at(d), half_at(dmin), scales, mins);
        pack_2_bits(blocks.levels, bytes + 16);
    }

    static void restore(const I *bytes, F *x) {
        const F d = half_at(bytes + 80), dmin = half_at(bytes + 82);
        I levels[256];
        unpack_2_bits(bytes + 16, levels);
        for (int j = 0; j < 16; j++) {
            const F scale = d * to_float(bytes[j] & 15), min = dmin * to_float(bytes[j] >> 4);
            for (int i = 16 * j; i < 16 * j + 16; i++) x[i] = scale * to_float(levels[i]) - min;
        }
    }

    static void fit_plain(const F *x, AffineBlocks<16, 3> &blocks) {
        constexpr int AT_ONCE = AffineBlocks<16, 3>::AT_ONCE;
        F weight[16 * AT_ONCE];
        for (int j = 0; j < 16; j += AT_ONCE) {
            for (int i = 0; i < 16 * AT_ONCE; i++) weight[i] = absolute(x[16 * j + i]);
            blocks.fit<true>(j, x, weight, {-0.5f, 0.1f, 15});
        }
    }

    static I scale_by_largest(const F *values, I *value_levels) {
        const F max = largest(values, 16);
        for (int j = 0; j < 16; j++) value_levels[j] = max > 0 ? nearest(15.f / max * values[j]) & 0xff : (I){};
        return max > 0 ? to_half(max / 15.f) : (I){};
    }
};

// Levels of x / scale in blocks of 16, from 0; `searched(j, i)` gives those of blocks whose scale is zero.
template <int TOP, class Searched>
inline void set_symmetric_levels(const F *x, F d, const I *scales, Searched searched, I *levels) {
    for (int j = 0; j < 16; j++) {
        const F scale = d * to_float(scales[j]);
        I *l = levels + 16 * j;
        for (int i = 0; i < 16; i++) l[i] = TOP + clamp(nearest(x[16 * j + i] / scale), -TOP, TOP - 1);
        const I zero = scale == 0;
        if (!any(zero)) continue;
        for (int i = 0; i < 16; i++) l[i] = zero ? searched(j, i) : l[i];
    }
}

// A signed byte's value.
inline I as_int8(I value) { return value << 24 >> 24; }

struct Q3_K {
    static constexpr int N = 256, BYTES = 110;

    static void quantize(const F *x, const F *importance, I *bytes) {
        I scales[16], searched[256], levels[256], *d = bytes + 108;
        const bool plain = importance == nullptr;
        put_half(d, plain ? scale_plain(x, scales, searched) : scale_important(x, importance, scales, searched));
        for (int j = 0; j < 8; j++) bytes[96 + j] = (scales[j] & 15) | (scales[j + 8] & 15) << 4;
        for (int j = 0; j < 4; j++)
            bytes[104 + j] =
                scales[j] >> 4 | scales[j + 4] >> 4 << 2 | scales[j + 8] >> 4 << 4 | scales[j + 12] >> 4 << 6;
        for (int j = 0; j < 16; j++) scales[j] -= 32;
        set_symmetric_levels<4>(x, half_at(d), scales, [&](int j, int i) { return searched[16 * j + i]; }, levels);
        for (int i = 0; i < 32; i++) {
            bytes[i] = (I){};
            for (int j = 0; j < 8; j++) bytes[i] |= levels[32 * j + i] >> 2 << j;
        }
        pack_2_bits(levels, bytes + 32);
    }

    static void restore(const I *bytes, F *x) {
        const F d = half_at(bytes + 108);
        I levels[256];
        unpack_2_bits(bytes + 32, levels);
        add_bits<2>(bytes, levels);
        for (int j = 0; j < 16; j++) {
            const I low = bytes[96 + j % 8] >> j / 8 * 4 & 15, high = bytes[104 + j % 4] >> j / 4 * 2 & 3;
            const F scale = d * to_float((low | high << 4) - 32);
            for (int i = 16 * j; i < 16 * j + 16; i++) x[i] = scale * to_float(levels[i] - 4);
        }
    }

    static I scale_plain(const F *x, I *scales, I *searched) {
        F fitted[16], max, distance;
        for (int j = 0; j < 16; j++) fitted[j] = fit_by_turns<16, 4>(x + 16 * j, searched + 16 * j);
        farthest(fitted, 16, max, distance);
        const F inverse = -32.f / max;
        for (int j = 0; j < 16; j++) {
            I level = clamp(as_int8(nearest(inverse * fitted[j])), -32, 31) + 32;
            scales[j] = max != 0 ? level : (I){};
        }
        return max != 0 ? to_half(1 / inverse) : (I){};
    }

    static I scale_important(const F *x, const F *importance, I *scales, I *searched) {
        F fitted[16], weight[16], weight_sums[16];
        const F sigma2 = 2 * sum_of_squares(x, 256) / 256;
        for (int j = 0; j < 16; j++) {
            const F *block = x + 16 * j;
            weight_sums[j] = importance_weights(block, importance + 16 * j, sigma2, 16, weight);
            const auto fit = fit_symmetric<16, 4>(block, weight);
            for (int i = 0; i < 16; i++) searched[16 * j + i] = fit.level(block[i]);
            fitted[j] = fit.scale;
        }
        const auto fit = fit_symmetric<16, 32>(fitted, weight_sums);
        for (int j = 0; j < 16; j++) scales[j] = fit.level(fitted[j]);
        return to_half(fit.scale);
    }
};

struct Q6_K {
    static constexpr int N = 256, BYTES = 210;

    static void quantize(const F *x, const F *importance, I *bytes) {
        Symmetric<32> fits[16];
        F scales[16], max, distance;
        for (int j = 0; j < 16; j++) {
            F squares[16];
            for (int i = 0; i < 16; i++) squares[i] = x[16 * j + i] * x[16 * j + i];
            fits[j] = fit_symmetric<16, 32>(x + 16 * j, importance != nullptr ? importance + 16 * j : squares);
            scales[j] = fits[j].scale;
        }
        farthest(scales, 16, max, distance);
        const F inverse = -128.f / max;
        put_half(bytes + 208, to_half(1 / inverse));
        I scale_levels[16], levels[256];
        for (int j = 0; j < 16; j++) {
            I l = nearest(inverse * scales[j]);
            scale_levels[j] = as_int8(l < 127 ? l : 127);
            bytes[192 + j] = scale_levels[j] & 0xff;
        }
        const auto searched = [&](int j, int i) { return fits[j].level(x[16 * j + i]); };
        set_symmetric_levels<32>(x, half_at(bytes + 208), scale_levels, searched, levels);
        for (int i = 0; i < 64; i++) {
            const I *l = levels + i / 32 * 128 + i % 32;
            bytes[i / 32 * 64 + i % 32] = (l[0] & 15) | (l[64] & 15) << 4;
            bytes[i / 32 * 64 + 32 + i % 32] = (l[32] & 15) | (l[96] & 15) << 4;
            bytes[128 + i] = l[0] >> 4 | l[32] >> 4 << 2 | l[64] >> 4 << 4 | l[96] >> 4 << 6;
        }
        const I zero = distance < SMALLEST;
        if (any(zero))
            for (int i = 0; i < BYTES; i++) bytes[i] = zero ? (I){} : bytes[i];
    }

    static void restore(const I *bytes, F *x) {
        const F d = half_at(bytes + 208);
        I levels[256];
        for (int i = 0; i < 64; i++) {
            I *l = levels + i / 32 * 128 + i % 32;
            const I *low = bytes + i / 32 * 64 + i % 32, high = bytes[128 + i];
            l[0] = (low[0] & 15) | (high & 3) << 4;
            l[32] = (low[32] & 15) | (high >> 2 & 3) << 4;
            l[64] = low[0] >> 4 | (high >> 4 & 3) << 4;
            l[96] = low[32] >> 4 | (high >> 6) << 4;
        }
        for (int j = 0; j < 16; j++) {
            const F scale = d * to_float(as_int8(bytes[192 + j]));
            for (int i = 16 * j; i < 16 * j + 16; i++) x[i] = scale * to_float(levels[i] - 32);
        }
    }
};

struct Q8_0 {
    static constexpr int N = 32, BYTES = 34;

    static void quantize(const F *x, const F *, I *bytes) {
        F max = {};
        for (int i = 0; i < 32; i++) max = max > absolute(x[i]) ? max : absolute(x[i]);
        const F d = max / 127.f, inverse = d != 0 ? 1.f / d : (F){};
        put_half(bytes, to_half(d));
        for (int i = 0; i < 32; i++) {
            // Half away from zero: the largest float below 0.5 is added, then the fraction cut off.
            F scaled = x[i] * inverse, half = (F)(((I)scaled & INT32_MIN) | 0x3effffff);
            bytes[2 + i] = __builtin_convertvector(scaled + half, I) & 0xff;
        }
    }

    static void restore(const I *bytes, F *x) {
        const F d = half_at(bytes);
        for (int i = 0; i < 32; i++) x[i] = to_float(as_int8(bytes[2 + i])) * d;
    }
};

}  // namespace
