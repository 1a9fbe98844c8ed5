// Quantizes rows, LANES blocks at a time; compiled once for each instruction set.

#include "iq4.hpp"
#include "measure.hpp"

namespace {

// x[j] lane i = src[i][j].
template <int N>
void gather(const float *const *src, F *x) {
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < N; i++) x[i][lane] = src[lane][i];
}

// out[i * BYTES + j] = bytes[j] lane i, for the first n lanes.
template <int BYTES>
void scatter(const I *bytes, uint8_t *out, int64_t n) {
    constexpr int WORDS = (BYTES + 3) / 4;
    I words[WORDS];
    for (int k = 0; k < WORDS; k++) {
        words[k] = bytes[4 * k] | bytes[4 * k + 1] << 8;
        if (4 * k + 2 < BYTES) words[k] |= bytes[4 * k + 2] << 16 | bytes[4 * k + 3] << 24;
    }
    for (int lane = 0; lane < n; lane++) {
        for (int k = 0; k < BYTES / 4; k++) memcpy(out + lane * BYTES + 4 * k, (const int32_t *)&words[k] + lane, 4);
        if (BYTES % 4) memcpy(out + lane * BYTES + BYTES / 4 * 4, (const int32_t *)&words[BYTES / 4] + lane, 2);
    }
}

template <class Format>
void restore(const uint8_t *bytes, int64_t n_weights, float *out) {
    for (int64_t i = 0; i < n_weights / Format::N; i++)
        Format::restore(bytes + i * Format::BYTES, out + i * Format::N);
}

// Rows of one length follow each other, so a group may span rows; the last lanes of the last group repeat its first.
template <class Format>
void quantize(const float *rows, int64_t n_rows, int64_t row_size, const float *importance, uint8_t *out) {
    const int64_t n_per_row = row_size / Format::N, n = n_rows * n_per_row;
    F x[Format::N], weights[Format::N];
    I bytes[Format::BYTES];
    for (int64_t first = 0; first < n; first += LANES) {
        const int64_t n_lanes = n - first < LANES ? n - first : LANES;
        const float *blocks[LANES], *columns[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t block = first + (lane < n_lanes ? lane : 0);
            blocks[lane] = rows + block * Format::N;
            columns[lane] = importance != nullptr ? importance + block % n_per_row * Format::N : nullptr;
        }
        gather<Format::N>(blocks, x);
        if (importance != nullptr) gather<Format::N>(columns, weights);
        Format::quantize(x, importance != nullptr ? weights : nullptr, bytes);
        scatter<Format::BYTES>(bytes, out + first * Format::BYTES, n_lanes);
    }
}

}  // namespace

#define NAME_(function, lanes) function##_##lanes##_lanes
#define NAME(function, lanes) NAME_(function, lanes)

extern "C" int NAME(quantize, LANES)(
    int type, const float *rows, int64_t n_rows, int64_t row_size, const float *importance, uint8_t *out
) {
    switch (type) {  // ggml_type, ggml.h
        case 8: quantize<Q8_0>(rows, n_rows, row_size, importance, out); return 1;
        case 10: quantize<Q2_K>(rows, n_rows, row_size, importance, out); return 1;
        case 11: quantize<Q3_K>(rows, n_rows, row_size, importance, out); return 1;
        case 12: quantize<Q4_K>(rows, n_rows, row_size, importance, out); return 1;
        case 13: quantize<Q5_K>(rows, n_rows, row_size, importance, out); return 1;
        case 14: quantize<Q6_K>(rows, n_rows, row_size, importance, out); return 1;
        case 20: quantize<IQ4_NL>(rows, n_rows, row_size, importance, out); return 1;
        case 23: quantize<IQ4_XS>(rows, n_rows, row_size, importance, out); return 1;
    }
    return 0;
}

extern "C" int NAME(dequantize, LANES)(int type, const uint8_t *bytes, int64_t n_weights, float *out) {
    switch (type) {
        case 20: restore<IQ4_NL>(bytes, n_weights, out); return 1;
        case 23: restore<IQ4_XS>(bytes, n_weights, out); return 1;
    }
    return 0;
}

extern "C" int NAME(all_finite, LANES)(const float *x, int64_t n) { return all_finite(x, n); }

extern "C" void NAME(measure, LANES)(
    const float *rows, const float *restored, int64_t n_rows, int64_t row_size, double *out
) {
    out[0] = out[1] = out[2] = 0;
    for (int64_t row = 0; row < n_rows; row++)
        measure_row(rows + row * row_size, restored + row * row_size, row_size, out);
}
