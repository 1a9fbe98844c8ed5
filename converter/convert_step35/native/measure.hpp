// What quantization did to a matrix: its largest error, the sum of squared errors, and the sum of squares.
#pragma once

#include "lanes.hpp"

namespace {

inline F load(const float *x) {
    F values;
    memcpy(&values, x, sizeof values);
    return values;
}

// The sums of some values in float32, as many at once as two vectors hold.
struct Sums {
    F largest[2] = {}, error[2] = {}, square[2] = {};

    void add(const float *x, const float *restored) {
        for (int k = 0; k < 2; k++) {
            const F value = load(x + k * LANES), difference = load(restored + k * LANES) - value;
            largest[k] = absolute(difference) > largest[k] ? absolute(difference) : largest[k];
            error[k] += difference * difference;
            square[k] += value * value;
        }
    }
};

inline bool all_finite(const float *x, int64_t n) {
    I largest[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int k = 0; k < 2; k++) {
            const I magnitude = (I)absolute(load(x + i + k * LANES));
            largest[k] = magnitude > largest[k] ? magnitude : largest[k];
        }
    bool finite = !any((largest[0] >= 0x7f800000) | (largest[1] >= 0x7f800000));
    for (; i < n; i++) finite = finite && __builtin_isfinite(x[i]);
    return finite;
}

inline double total(F values) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

// Adds a row to out[3]: sums are float32 within the row and double over rows.
inline void measure_row(const float *x, const float *restored, int64_t n, double *out) {
    Sums sums;
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) sums.add(x + i, restored + i);
    if (i < n) {
        float rest_x[2 * LANES] = {}, rest_restored[2 * LANES] = {};
        memcpy(rest_x, x + i, (n - i) * sizeof(float));
        memcpy(rest_restored, restored + i, (n - i) * sizeof(float));
        sums.add(rest_x, rest_restored);
    }
    for (int k = 0; k < 2; k++)
        for (int lane = 0; lane < LANES; lane++)
            if (sums.largest[k][lane] > out[0]) out[0] = sums.largest[k][lane];
    out[1] += total(sums.error[0] + sums.error[1]);
    out[2] += total(sums.square[0] + sums.square[1]);
}

}  // namespace
