// What quantization did to weights: the largest error, the sum of squared errors, and the sum of squares.
#pragma once

#include "lanes.hpp"

namespace {

inline F load(const float *x) {
    F values;
    memcpy(&values, x, sizeof values);
    return values;
}

// Whether none of x[n] is NaN or infinite.
inline bool all_finite(const F *x, int n) {
    I found = {};
    for (int i = 0; i < n; i++) found |= (I)absolute(x[i]) >= 0x7f800000;
    return !any(found);
}

inline bool all_finite(const float *x, int64_t n) {
    constexpr int AT_ONCE = 16;
    int64_t i = 0;
    bool finite = true;
    for (; i + AT_ONCE * LANES <= n; i += AT_ONCE * LANES) {
        F values[AT_ONCE];
        memcpy(values, x + i, sizeof values);
        finite = finite && all_finite(values, AT_ONCE);
    }
    for (; i < n; i++) finite = finite && __builtin_isfinite(x[i]);
    return finite;
}

// The sums of a block, or of a row, in float32; as many at once as two vectors hold.
struct Sums {
    F largest[2] = {}, error[2] = {}, square[2] = {};

    void add(int k, F value, F restored) {
        const F difference = restored - value;
        largest[k] = absolute(difference) > largest[k] ? absolute(difference) : largest[k];
        error[k] += difference * difference;
        square[k] += value * value;
    }

    // Adds the first n lanes to out[3], in double.
    void add_to(double *out, int n) const {
        const F largest_of_both = largest[0] > largest[1] ? largest[0] : largest[1];
        const F errors = error[0] + error[1], squares = square[0] + square[1];
        for (int lane = 0; lane < n; lane++) {
            if (largest_of_both[lane] > out[0]) out[0] = largest_of_both[lane];
            out[1] += errors[lane];
            out[2] += squares[lane];
        }
    }
};

// A block in each lane: adds those of the first n_lanes to out[3].
template <int N>
inline void measure_blocks(const F *x, const F *restored, int n_lanes, double *out) {
    Sums sums;
    for (int i = 0; i < N; i += 2) {
        sums.add(0, x[i], restored[i]);
        sums.add(1, x[i + 1], restored[i + 1]);
    }
    sums.add_to(out, n_lanes);
}

inline void measure_row(const float *x, const float *restored, int64_t n, double *out) {
    Sums sums;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        sums.add(0, load(x + i), load(restored + i));
        sums.add(1, load(x + i + LANES), load(restored + i + LANES));
    }
    for (int k = 0; i < n; i += LANES, k++) {
        const int64_t n_bytes = (n - i < LANES ? n - i : LANES) * sizeof(float);
        float rest_x[LANES] = {}, rest_restored[LANES] = {};
        memcpy(rest_x, x + i, n_bytes);
        memcpy(rest_restored, restored + i, n_bytes);
        sums.add(k, load(rest_x), load(rest_restored));
    }
    sums.add_to(out, LANES);
}

}  // namespace
