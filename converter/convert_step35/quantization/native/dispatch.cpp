// The library's entry points. A call says for how many lanes; `step35_lanes` says how many this processor runs.

#include <cstdint>

#if defined __x86_64__
#define EACH_WIDTH(DO) DO(4) DO(8) DO(16)
#else
#define EACH_WIDTH(DO) DO(4)
#endif

#define DECLARE(LANES)                                                                                              \
    int quantize_##LANES##_lanes(                                                                                   \
        int, int, const uint8_t *, int64_t, int64_t, const float *, uint8_t *, double *);                           \
    int dequantize_##LANES##_lanes(int, const uint8_t *, int64_t, float *);                                         \
    int all_finite_##LANES##_lanes(const float *, int64_t);                                                         \
    void measure_##LANES##_lanes(const float *, const float *, int64_t, int64_t, double *);

extern "C" {
EACH_WIDTH(DECLARE)
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// The most lanes that this processor runs: 4, 8 or 16.
EXPORT int step35_lanes() {
#if defined __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 16;
    if (__builtin_cpu_supports("avx2")) return 8;
#endif
    return 4;
}

// Quantizes rows[n_rows][row_size], float32 or bfloat16, to one of ggml's types, given by its number; importance is
// null or one weight a column. With sums[3] every weight is looked at, and what the bytes give is compared: to them is
// added what `step35_measure` writes. Returns 1, 0 for a type that has no kernel (nothing is written), or 2 for a
// weight that is NaN or infinite (with sums; what is written then is of no use).
EXPORT int step35_quantize(
    int lanes, int type, int are_bfloat16, const uint8_t *rows, int64_t n_rows, int64_t row_size,
    const float *importance, uint8_t *out, double *sums
) {
#define QUANTIZE(LANES) \
    if (lanes == LANES) \
        return quantize_##LANES##_lanes(type, are_bfloat16, rows, n_rows, row_size, importance, out, sums);
    EACH_WIDTH(QUANTIZE)
    return 0;
}

// Writes out[n_weights]. Returns 0, and writes nothing, for a type that has no kernel.
EXPORT int step35_dequantize(int lanes, int type, const uint8_t *bytes, int64_t n_weights, float *out) {
#define DEQUANTIZE(LANES) \
    if (lanes == LANES) return dequantize_##LANES##_lanes(type, bytes, n_weights, out);
    EACH_WIDTH(DEQUANTIZE)
    return 0;
}

// Whether none of x[n] is NaN or infinite.
EXPORT int step35_all_finite(int lanes, const float *x, int64_t n) {
#define ALL_FINITE(LANES) \
    if (lanes == LANES) return all_finite_##LANES##_lanes(x, n);
    EACH_WIDTH(ALL_FINITE)
    return 0;
}

// Writes out[3]: the largest |restored - rows|, the sum of their squared differences, the sum of squared rows.
EXPORT void step35_measure(
    int lanes, const float *rows, const float *restored, int64_t n_rows, int64_t row_size, double *out
) {
#define MEASURE(LANES) \
    if (lanes == LANES) measure_##LANES##_lanes(rows, restored, n_rows, row_size, out);
    EACH_WIDTH(MEASURE)
}
