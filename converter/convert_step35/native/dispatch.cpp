// The library's entry points: each call goes to the widest kernels that this processor runs.

#include <cstdint>

typedef int Kernel(int type, const float *rows, int64_t n_rows, int64_t row_size, const float *importance, uint8_t *out);

extern "C" {
Kernel quantize_4_lanes;
#if defined __x86_64__
Kernel quantize_8_lanes, quantize_16_lanes;
#endif
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// How many blocks are quantized at once.
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
    int type, const float *rows, int64_t n_rows, int64_t row_size, const float *importance, uint8_t *out, int lanes
) {
#if defined __x86_64__
    if (lanes == 16) return quantize_16_lanes(type, rows, n_rows, row_size, importance, out);
    if (lanes == 8) return quantize_8_lanes(type, rows, n_rows, row_size, importance, out);
#endif
    return lanes == 4 && quantize_4_lanes(type, rows, n_rows, row_size, importance, out);
}
