// Quantizes blocks and restores them, LANES at a time; compiled once for each instruction set.

#include "iq4.hpp"
#include "measure.hpp"

namespace {

// How weights are stored, in words of 32 bits; `widen` gives a word's weights as float32, in their order.
struct Float32 {
    static constexpr int IN_WORD = 1;
    static void widen(I words, F *x) { x[0] = (F)words; }
};

struct Bfloat16 {
    static constexpr int IN_WORD = 2;
    static void widen(I words, F *x) {
        x[0] = (F)(words << 16);
        x[1] = (F)(words & (int32_t)0xffff0000);
    }
};

// x[j] lane i = weight j of src[i].
template <class Stored, int N>
void gather(const uint8_t *const *src, F *x) {
    for (int i = 0; i < N / Stored::IN_WORD; i += LANES) {
        I words[LANES];
        for (int lane = 0; lane < LANES; lane++) memcpy(&words[lane], src[lane] + 4 * i, sizeof(I));
        transpose(words);
        for (int j = 0; j < LANES; j++) Stored::widen(words[j], x + (i + j) * Stored::IN_WORD);
    }
}

// out[i * BYTES + j] = bytes[j] lane i, for the first n lanes.
template <int BYTES>
void scatter(const I *bytes, uint8_t *out, int n) {
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

enum Outcome { NO_KERNEL, DONE, NOT_FINITE };

// What to quantize: rows of one length that follow each other, and one weight a column or null.
struct Rows {
    bool are_bfloat16;
    const uint8_t *weights;
    int64_t n_rows, row_size;
    const float *importance;

    // Asks for the blocks from `first` on: they come from the disk, so no cache has them, and there is time until then.
    template <int N>
    void ask_for(int64_t first, int n_lanes) const {
        const int64_t block_bytes = N * (are_bfloat16 ? 2 : 4);
        for (int64_t i = 0; i < n_lanes * block_bytes; i += 64) __builtin_prefetch(weights + first * block_bytes + i);
    }

    // N weights of LANES blocks from `first` on; lanes without a block repeat the first.
    template <int N>
    void take(int64_t first, int n_lanes, F *x, F *columns) const {
        const uint8_t *blocks[LANES], *importances[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t block = first + (lane < n_lanes ? lane : 0);
            blocks[lane] = weights + block * N * (are_bfloat16 ? 2 : 4);
            if (importance != nullptr)
                importances[lane] = (const uint8_t *)(importance + block % (row_size / N) * N);
        }
        are_bfloat16 ? gather<Bfloat16, N>(blocks, x) : gather<Float32, N>(blocks, x);
        if (importance != nullptr) gather<Float32, N>(importances, columns);
    }
};

inline int lanes_left(int64_t first, int64_t n) { return n - first < LANES ? int(n - first) : LANES; }

// A group of blocks may span rows. With sums[3] all weights are checked and what the bytes give is measured.
template <class Format>
Outcome quantize(const Rows &rows, uint8_t *out, double *sums) {
    constexpr int N = Format::N;
    const int64_t n = rows.n_rows * (rows.row_size / N);
    F x[N], columns[N], restored[N];
    I bytes[Format::BYTES];
    for (int64_t first = 0; first < n; first += LANES) {
        const int n_lanes = lanes_left(first, n);
        rows.take<N>(first, n_lanes, x, columns);
        if (first + LANES < n) rows.ask_for<N>(first + LANES, lanes_left(first + LANES, n));
        if (sums != nullptr && !all_finite(x, N)) return NOT_FINITE;
        Format::quantize(x, rows.importance != nullptr ? columns : nullptr, bytes);
        scatter<Format::BYTES>(bytes, out + first * Format::BYTES, n_lanes);
        if (sums == nullptr) continue;
        Format::restore(bytes, restored);
        measure_blocks<N>(x, restored, n_lanes, sums);
    }
    return DONE;
}

template <class Format>
Outcome restore(const uint8_t *data, int64_t n_weights, float *out) {
    constexpr int N = Format::N;
    const int64_t n = n_weights / N;
    I bytes[Format::BYTES];
    F x[N];
    for (int64_t first = 0; first < n; first += LANES) {
        const int n_lanes = lanes_left(first, n);
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < Format::BYTES; i++)
                bytes[i][lane] = data[(first + (lane < n_lanes ? lane : 0)) * Format::BYTES + i];
        Format::restore(bytes, x);
        for (int i = 0; i < N; i += LANES) {
            transpose((I *)x + i);
            for (int lane = 0; lane < n_lanes; lane++) memcpy(out + (first + lane) * N + i, x + i + lane, sizeof(F));
        }
    }
    return DONE;
}

}  // namespace

// Numbers of ggml_type, ggml.h.
#define EACH_FORMAT(DO) \
    DO(8, Q8_0) DO(10, Q2_K) DO(11, Q3_K) DO(12, Q4_K) DO(13, Q5_K) DO(14, Q6_K) DO(20, IQ4_NL) DO(23, IQ4_XS)

#define NAME_(function, lanes) function##_##lanes##_lanes
#define NAME(function, lanes) NAME_(function, lanes)

extern "C" int NAME(quantize, LANES)(
    int type, int are_bfloat16, const uint8_t *weights, int64_t n_rows, int64_t row_size, const float *importance,
    uint8_t *out, double *sums
) {
    const Rows rows = {are_bfloat16 != 0, weights, n_rows, row_size, importance};
    switch (type) {
#define QUANTIZE(NUMBER, FORMAT) \
    case NUMBER: return quantize<FORMAT>(rows, out, sums);
        EACH_FORMAT(QUANTIZE)
    }
    return NO_KERNEL;
}

extern "C" int NAME(dequantize, LANES)(int type, const uint8_t *bytes, int64_t n_weights, float *out) {
    switch (type) {
#define RESTORE(NUMBER, FORMAT) \
    case NUMBER: return restore<FORMAT>(bytes, n_weights, out);
        EACH_FORMAT(RESTORE)
    }
    return NO_KERNEL;
}

extern "C" int NAME(all_finite, LANES)(const float *x, int64_t n) { return all_finite(x, n); }

extern "C" void NAME(measure, LANES)(
    const float *rows, const float *restored, int64_t n_rows, int64_t row_size, double *out
) {
    out[0] = out[1] = out[2] = 0;
    for (int64_t row = 0; row < n_rows; row++)
        measure_row(rows + row * row_size, restored + row * row_size, row_size, out);
}
