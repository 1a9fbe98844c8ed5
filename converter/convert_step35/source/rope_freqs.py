"""The values of rope_freqs.weight, which no checkpoint stores: they follow from its config."""

import math

import numpy as np

from convert_step35.source.architecture import Architecture, Llama3Rope


def rope_freqs(arch: Architecture) -> np.ndarray:
    """The llama3 divisors of the full layers' rotary frequencies, float32 [head_dim / 2].

    The first rotary_dim / 2 entries are the divisors, the rest 1.0; sliding layers don't use the tensor.
    Formula: transformers' _compute_llama3_parameters, as conversion/step3.py writes it, in float32 steps.
    """
    scaling = arch.rope_scaling
    assert scaling is not None, "only a config with rope_scaling has the tensor"
    rotary_dim = int(arch.head_dim * arch.rotary_factor_full)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequencies = np.float32(1.0) / np.power(np.float32(arch.rope_theta_full), exponents)
    wavelengths = [2 * math.pi / float(f) for f in frequencies]
    divisors = [_llama3_divisor(w, scaling) for w in wavelengths]
    return np.array(divisors + [1.0] * (arch.head_dim // 2 - len(divisors)), dtype=np.float32)


def _llama3_divisor(wavelength: float, scaling: Llama3Rope) -> float:
    if wavelength < scaling.original_context / scaling.high_freq_factor:
        return 1.0
    if wavelength > scaling.original_context / scaling.low_freq_factor:
        return scaling.factor
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
