"""Triton's kernels where there is no card: Triton's interpreter runs them."""

from __future__ import annotations

import os
import sys

import jax
import pytest


@pytest.fixture(scope="session")
def triton_kernels() -> None:
    """Make implementation="triton" run: as it is on a card, elsewhere through Triton's interpreter.

    Triton decides when a kernel is defined, by TRITON_INTERPRET, whether it will be interpreted. The variable is set
    only while the kernels' modules are imported, so that neither other tests nor the processes they start see it.
    """
    if jax.default_backend() == "gpu":
        return
    pytest.importorskip("torch", reason="Triton's interpreter needs torch")
    if "triton" not in sys.modules:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            pytest.importorskip("triton")
        finally:
            os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
    import triton

    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from lotaqaf_jax.kernels.adjust import triton as adjust_kernels
        from lotaqaf_jax.kernels.matmul import triton as matmul_kernels
    finally:
        os.environ.pop("TRITON_INTERPRET")
    del triton, adjust_kernels, matmul_kernels
