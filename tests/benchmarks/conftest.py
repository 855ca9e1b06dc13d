"""Without a card, Triton's interpreter runs the kernels; Triton reads the variable when a kernel is defined."""

import os

import jax

if jax.default_backend() != "gpu":
    os.environ["TRITON_INTERPRET"] = "1"
