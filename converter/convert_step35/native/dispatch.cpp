// The library's entry points: each call goes to the kernels for as many lanes as it asks for.

#include <cstdint>

typedef int Quantize(int type, const float *rows, int64_t n_rows, int64_t row_size, const float *importance, uint8_t *out);
typedef void Measure(const float *rows, const float *restored, int64_t n_rows, int64_t row_size, double *out);

extern "C" {
Quantize quantize_4_lanes;
Measure measure_4_lanes;
#if defined __x86_64__
Quantize quantize_8_lanes, quantize_16_lanes;
Measure measure_8_lanes, measure_16_lanes;
#endif
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

// Quantizes float32 rows[n_rows][row_size] to one of ggml's types, given by its number; importance is null or
// one weight a column. Returns 0, and writes nothing, for a type that has no kernel.
EXPORT int step35_quantize(
    int lanes, int type, const float *rows, int64_t n_rows, int64_t row_size, const float *importance, uint8_t *out
) {
#if defined __x86_64__
    if (lanes == 16) return quantize_16_lanes(type, rows, n_rows, row_size, importance, out);
    if (lanes == 8) return quantize_8_lanes(type, rows, n_rows, row_size, importance, out);
#endif
    return lanes == 4 && quantize_4_lanes(type, rows, n_rows, row_size, importance, out);
}

// Writes out[3]: the largest |restored - rows|, the sum of their squared differences, the sum of squared rows.
EXPORT void step35_measure(
    int lanes, const float *rows, const float *restored, int64_t n_rows, int64_t row_size, double *out
) {
#if defined __x86_64__
    if (lanes == 16) return measure_16_lanes(rows, restored, n_rows, row_size, out);
    if (lanes == 8) return measure_8_lanes(rows, restored, n_rows, row_size, out);
#endif
    measure_4_lanes(rows, restored, n_rows, row_size, out);
}
