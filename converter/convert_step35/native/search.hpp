// The searches for a scale, or a scale and a minimum, that lose least; each lane searches for its own block.
//
// The formulas and their order of operations are those of ggml-quants.c (llama.cpp, MIT license), whose names
// are given: another order would give other last bits.
#pragma once

#include "lanes.hpp"

namespace {

constexpr float SMALLEST = 1e-15f;  // blocks that stay below are zero

// The scales to try: (first + step * i + top) / range for i = 0 ... n.
struct Steps {
    float first, step;
    int n;
};

// x ~ scale * level + min. The levels are those of `level(x, inverse, base)`.
struct Affine {
    F scale, min, inverse, base;
};

template <int TOP>
inline I level(F x, F inverse, F base) {
    return clamp(nearest(inverse * (x - base)), 0, TOP);
}

template <bool ABSOLUTE>
inline F penalty(F difference) {
    return ABSOLUTE ? absolute(difference) : difference * difference;
}

// make_qkx2_quants and make_qkx3_quants.
template <int N, int TOP, bool ABSOLUTE = false>
inline Affine fit_affine(const F *x, const F *weight, Steps steps) {
    F min = x[0], max = x[0], sum_w = weight[0], sum_x = sum_w * x[0];
    for (int i = 1; i < N; i++) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    min = min > 0 ? (F){} : min;
    const I flat = max <= min;
    F inverse = float(TOP) / (max - min), error = {};
    Affine best = {1 / inverse, min, inverse, min};
    for (int i = 0; i < N; i++) {
        F difference = best.scale * to_float(level<TOP>(x[i], inverse, min)) + min - x[i];
        error += weight[i] * penalty<ABSOLUTE>(difference);
    }
    for (int step = 0; step <= steps.n; step++) {
        F levels[N], sum_l = {}, sum_l2 = {}, sum_xl = {}, new_error = {};
        inverse = (steps.first + steps.step * step + TOP) / (max - best.min);
        for (int i = 0; i < N; i++) {
            levels[i] = to_float(level<TOP>(x[i], inverse, best.min));
            F wl = weight[i] * levels[i];
            sum_l += wl;
            sum_l2 += wl * levels[i];
            sum_xl += wl * x[i];
        }
        F determinant = sum_w * sum_l2 - sum_l * sum_l;
        F scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        F new_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        I above = new_min > 0;
        new_min = above ? (F){} : new_min;
        scale = above ? sum_xl / sum_l2 : scale;
        for (int i = 0; i < N; i++)
            new_error += weight[i] * penalty<ABSOLUTE>(scale * levels[i] + new_min - x[i]);
        I better = (determinant > 0) & (new_error < error);
        error = better ? new_error : error;
        best.inverse = better ? inverse : best.inverse;
        best.base = better ? best.min : best.base;
        best.scale = better ? scale : best.scale;
        best.min = better ? new_min : best.min;
    }
    const F zero = {};
    return {flat ? zero : best.scale, flat ? min : best.min, flat ? zero : best.inverse, flat ? zero : best.base};
}

// x ~ scale * (level - TOP), levels 0 ... 2 * TOP - 1; all levels are 0 where the block is.
template <int TOP>
struct Symmetric {
    F scale, inverse;
    I flat;

    I level(F x) const { return flat ? (I){} : TOP + signed_level(x, inverse); }
    static I signed_level(F x, F inverse) { return clamp(nearest(inverse * x), -TOP, TOP - 1); }
};

// The value farthest from zero, the first of equals, and its distance.
inline void farthest(const F *x, int n, F &value, F &distance) {
    value = distance = (F){};
    for (int i = 0; i < n; i++) {
        I farther = absolute(x[i]) > distance;
        distance = farther ? absolute(x[i]) : distance;
        value = farther ? x[i] : value;
    }
}

// make_qx_quants with weights.
template <int N, int TOP>
inline Symmetric<TOP> fit_symmetric(const F *x, const F *weight) {
    F max, distance, scale = {}, best = {};
    farthest(x, N, max, distance);
    const I flat = distance < SMALLEST;
    F inverse = float(-TOP) / max;
    for (int step = -10; step <= 9; step++) {
        if (step == 0) continue;
        // The first try is the plain one.
        F new_inverse = step == -10 ? inverse : -(TOP + 0.1f * step) / max, sum_xl = {}, sum_l2 = {};
        for (int i = 0; i < N; i++) {
            F l = to_float(Symmetric<TOP>::signed_level(x[i], new_inverse));
            sum_xl += weight[i] * x[i] * l;
            sum_l2 += weight[i] * l * l;
        }
        I better = step == -10 ? sum_l2 != 0 : (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2);
        inverse = better ? new_inverse : inverse;
        scale = better ? sum_xl / sum_l2 : scale;
        best = better ? scale * sum_xl : best;
    }
    return {flat ? (F){} : scale, inverse, flat};
}

// make_q3_quants: writes the levels.
template <int N, int TOP>
inline F fit_by_turns(const F *x, I *levels) {
    F max, distance, sum_xl = {}, sum_l2 = {};
    farthest(x, N, max, distance);
    const I flat = distance < SMALLEST;
    for (int i = 0; i < N; i++) {
        levels[i] = Symmetric<TOP>::signed_level(x[i], float(-TOP) / max);
        F w = x[i] * x[i], l = to_float(levels[i]);
        sum_xl += w * x[i] * l;
        sum_l2 += w * l * l;
    }
    for (int round = 0; round < 5; round++) {
        I changed = {};
        for (int i = 0; i < N; i++) {
            F w = x[i] * x[i], old = to_float(levels[i]);
            F xl = sum_xl - w * x[i] * old, l2 = sum_l2 - w * old * old;
            I l = clamp(nearest(x[i] * l2 / xl), -TOP, TOP - 1);
            I valid = (xl > 0) & (l != levels[i]);
            xl += w * x[i] * to_float(l);
            l2 += w * to_float(l) * to_float(l);
            I better = valid & (l2 > 0) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
            levels[i] = better ? l : levels[i];
            sum_xl = better ? xl : sum_xl;
            sum_l2 = better ? l2 : sum_l2;
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < N; i++) levels[i] = flat ? (I){} : levels[i] + TOP;
    return ~flat & (sum_l2 > 0) ? sum_xl / sum_l2 : (F){};
}

// make_qp_quants: x >= 0 by scale * level; writes levels of 8 bits.
template <int N, int TOP>
inline F fit_positive(const F *x, const F *weight, I *levels) {
    F max = {}, best_error = {}, sum_xl = {}, sum_l2 = {};
    for (int i = 0; i < N; i++) max = max > x[i] ? max : x[i];
    const I flat = max < SMALLEST;
    F inverse = float(TOP) / max, scale = 1 / inverse;
    for (int i = 0; i < N; i++) {
        F difference = x[i] - scale * to_float(nearest(inverse * x[i]) & 0xff);
        best_error += weight[i] * difference * difference;
    }
    for (int step = -4; step <= 4; step++) {
        if (step == 0) continue;
        F new_inverse = (0.1f * step + TOP) / max, new_scale = 1 / new_inverse, error = {};
        for (int i = 0; i < N; i++) {
            I l = nearest(new_inverse * x[i]);
            F difference = x[i] - new_scale * to_float(l < TOP ? l : TOP);
            error += weight[i] * difference * difference;
        }
        I better = error < best_error;
        best_error = better ? error : best_error;
        inverse = better ? new_inverse : inverse;
    }
    for (int i = 0; i < N; i++) {
        I l = nearest(inverse * x[i]);
        l = l < TOP ? l : TOP;
        levels[i] = l & 0xff;
        sum_xl += weight[i] * x[i] * to_float(l);
        sum_l2 += weight[i] * to_float(l) * to_float(l);
    }
    for (int round = 0; round < 5; round++) {
        I changed = {};
        for (int i = 0; i < N; i++) {
            F w = weight[i], old = to_float(levels[i]);
            F xl = sum_xl - w * x[i] * old, l2 = sum_l2 - w * old * old;
            I l = nearest(x[i] * l2 / xl);
            l = l < TOP ? l : TOP;
            I valid = (xl > 0) & (l2 > 0) & (l != levels[i]);
            xl += w * x[i] * to_float(l);
            l2 += w * to_float(l) * to_float(l);
            I better = valid & (xl * xl * sum_l2 > sum_xl * sum_xl * l2);
            levels[i] = better ? l & 0xff : levels[i];
            sum_xl = better ? xl : sum_xl;
            sum_l2 = better ? l2 : sum_l2;
            changed |= better;
        }
        if (!any(changed)) break;
    }
    for (int i = 0; i < N; i++) levels[i] = flat ? (I){} : levels[i];
    return ~flat & (sum_l2 > 0) ? sum_xl / sum_l2 : (F){};
}

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

}  // namespace
