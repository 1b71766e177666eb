"""The shapes of the parameters that all benchmarks share."""

MODELS = {
    "a: 328 tensors, 1.0 M": [(64, 48)] * 328,
    "b: 64 tensors, 12 M": [(432, 432)] * 64,
    "c: 6 tensors, 21 M": [(1880, 1880)] * 6,
}
