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

template <int TOP, bool TAME>
inline F level_of(F x, F inverse, F base) {
    if (!TAME) return to_float(level<TOP>(x, inverse, base));
    return clamp(nearest_float(inverse * (x - base)), 0.f, float(TOP));
}

// One block's search in make_qkx2_quants and make_qkx3_quants, cut where several blocks can take turns.
template <int TOP, bool ABSOLUTE>
struct AffineSearch {
    Affine best;
    F low, max, sum_w, sum_x, error;
    I flat;
    F inverse, scale, min;  // of the try under way

    void begin_search(const F *x, const F *weight, int n) {
        low = max = x[0];
        sum_w = weight[0];
        sum_x = sum_w * x[0];
        for (int i = 1; i < n; i++) {
            low = x[i] < low ? x[i] : low;
            max = x[i] > max ? x[i] : max;
            sum_w += weight[i];
            sum_x += weight[i] * x[i];
        }
        min = low > 0 ? (F){} : low;
        flat = max <= min;
        begin_with(float(TOP) / (max - min), min);
        scale = 1 / inverse;
        error = (F){};
        best = {scale, min, inverse, min};
    }

    void begin_with(F new_inverse, F base) {
        inverse = flat ? (F){} : new_inverse;
        best.min = base;
    }

    void begin_try(float factor) { begin_with(factor / (max - best.min), best.min); }

    // Whether floats can round all levels of this try: none leaves 22 bits.
    bool is_tame() const {
        F bottom = absolute(inverse * (low - best.min)), top = absolute(inverse * (max - best.min));
        return !any(~((bottom <= 4194303.f) & (top <= 4194303.f)));
    }

    I solve(F sum_l, F sum_l2, F sum_xl) {
        F determinant = sum_w * sum_l2 - sum_l * sum_l;
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        I above = min > 0;
        min = above ? (F){} : min;
        scale = above ? sum_xl / sum_l2 : scale;
        return determinant > 0;
    }

    void keep_if(I better, F new_error) {
        error = better ? new_error : error;
        best.inverse = better ? inverse : best.inverse;
        best.base = better ? best.min : best.base;
        best.scale = better ? scale : best.scale;
        best.min = better ? min : best.min;
    }

    Affine result() const {
        const F zero = {}, flat_min = low > 0 ? zero : low;
        const F inverse = flat ? zero : best.inverse, base = flat ? zero : best.base;
        return {flat ? zero : best.scale, flat ? flat_min : best.min, inverse, base};
    }
};

// The searches of K blocks of N that follow each other at once: every sum waits for its last addition, and a try for
// the one before it, so one block leaves units idle. Sums are in locals, which compilers keep in registers.
template <int K, int N, int TOP, bool ABSOLUTE>
struct AffineSearches {
    const F *x, *weight;
    AffineSearch<TOP, ABSOLUTE> search[K];
    F levels[K * N];

    template <bool TAME>
    void take_levels() {
        for (int k = 0; k < K; k++) {
            const F inverse = search[k].inverse, base = search[k].best.min;
            for (int i = k * N; i < k * N + N; i++) levels[i] = level_of<TOP, TAME>(x[i], inverse, base);
        }
    }

    // The scales and minima that lose least with these levels; `solved` says in which blocks there are any.
    void solve(I *solved) {
        F l[K] = {}, l2[K] = {}, xl[K] = {};
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                const F level = levels[k * N + i], wl = weight[k * N + i] * level;
                l[k] += wl;
                l2[k] += wl * level;
                xl[k] += wl * x[k * N + i];
            }
        for (int k = 0; k < K; k++) solved[k] = search[k].solve(l[k], l2[k], xl[k]);
    }

    void add_errors(F *errors) const {
        F scale[K], min[K], sum[K] = {};
        for (int k = 0; k < K; k++) {
            scale[k] = search[k].scale;
            min[k] = search[k].min;
        }
        for (int i = 0; i < N; i++)
            for (int k = 0; k < K; k++) {
                const F difference = scale[k] * levels[k * N + i] + min[k] - x[k * N + i];
                sum[k] += weight[k * N + i] * (ABSOLUTE ? absolute(difference) : difference * difference);
            }
        for (int k = 0; k < K; k++) errors[k] = sum[k];
    }

    bool are_tame() const {
        bool tame = true;
        for (int k = 0; k < K; k++) tame = tame && search[k].is_tame();
        return tame;
    }

    // The first try is the plain one: its scale and minimum are not solved for.
    void run(Steps steps) {
        for (int k = 0; k < K; k++) search[k].begin_search(x + k * N, weight + k * N, N);
        for (int step = -1; step <= steps.n; step++) {
            const bool plain = step < 0;
            I solved[K];
            F errors[K];
            for (int k = 0; k < K && !plain; k++) search[k].begin_try(steps.first + steps.step * step + TOP);
            are_tame() ? take_levels<true>() : take_levels<false>();
            if (!plain) solve(solved);
            add_errors(errors);
            for (int k = 0; k < K; k++)
                search[k].keep_if(plain ? ~(I){} : solved[k] & (errors[k] < search[k].error), errors[k]);
        }
    }
};

template <int K, int N, int TOP, bool ABSOLUTE = false>
inline void fit_affine(const F *x, const F *weight, Steps steps, Affine *fits) {
    AffineSearches<K, N, TOP, ABSOLUTE> searches;
    searches.x = x;
    searches.weight = weight;
    searches.run(steps);
    for (int k = 0; k < K; k++) fits[k] = searches.search[k].result();
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

template <int N, int TOP, bool TAME>
inline void search_symmetric(const F *x, const F *weight, F max, F &scale, F &inverse) {
    F best = {};
    for (int step = -10; step <= 9; step++) {
        if (step == 0) continue;
        const bool plain = step == -10;
        F new_inverse = plain ? float(-TOP) / max : -(TOP + 0.1f * step) / max, sum_xl = {}, sum_l2 = {};
        for (int i = 0; i < N; i++) {
            F l = TAME ? clamp(nearest_float(new_inverse * x[i]), float(-TOP), float(TOP - 1))
                       : to_float(Symmetric<TOP>::signed_level(x[i], new_inverse));
            F wl = weight[i] * l;
            sum_xl += weight[i] * x[i] * l;
            sum_l2 += wl * l;
        }
        I better = plain ? sum_l2 != 0 : (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2);
        inverse = plain ? new_inverse : better ? new_inverse : inverse;
        scale = better ? sum_xl / sum_l2 : scale;
        best = better ? scale * sum_xl : best;
    }
}

// make_qx_quants with weights.
template <int N, int TOP>
inline Symmetric<TOP> fit_symmetric(const F *x, const F *weight) {
    F max, distance, scale = {}, inverse = {};
    farthest(x, N, max, distance);
    const I flat = distance < SMALLEST;
    if (any(~(distance < 1e37f)))
        search_symmetric<N, TOP, false>(x, weight, max, scale, inverse);
    else
        search_symmetric<N, TOP, true>(x, weight, max, scale, inverse);
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
