"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Most of the suite's time is compilation of the same few programs. The processes of one test run (xdist's workers and
# the command lines they start) share what they compile, and nothing outlives the run's temporary folder.
_RUN = os.environ.setdefault("LOTAQAF_TEST_RUN", os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))
_COMPILED = Path(tempfile.gettempdir()) / f"lotaqaf-tests-{_RUN}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_COMPILED)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Where a line of a program comes from is told by nobody who reads a test's outcome; finding it takes a twentieth.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Products of a few thousand numbers: torch's threads would mostly wait for each other, above all with a worker a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and data beside the repository, or where LOTAQAF_SHARED says."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("LOTAQAF_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set LOTAQAF_SHARED to run the tests on real files")
    return folder


# Tests that compare the bits of different programs, or of one with arithmetic of their own, are to have programs as
# users have them: a compiler may contract products and sums in one and not in the other. Elsewhere a test that does so
# is marked `optimized`; all others compare files, runs of one program, or numbers within a tolerance.
_OPTIMIZED = ("kernels", "optim", "quant", "test_adapters.py", "test_decoder.py", "test_default.py", "test_layers.py")
_OPTIMIZED += ("test_low_rank.py", "test_optim.py", "test_pretrained.py", "test_qalora.py", "test_ternary.py")
_OPTIMIZED += ("test_thresholds.py",)


def pytest_configure(config: pytest.Config) -> None:
    """`-m quick` leaves those out, and runs the others with programs that are hardly optimised, in half the time."""
    config.addinivalue_line("markers", "optimized: compares the bits of programs as users have them")
    config.addinivalue_line("markers", "quick: does not; set by place")
    if config.getoption("markexpr") == "quick":
        import jax  # not above, since it reads the environment when it is imported

        # A folder's own conftest.py may have imported it before; the rest is for the processes that tests start.
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
    # What is imported by now stays, and programs being traced are large: looking through all that often is a twentieth.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last process of the run, the one without a worker's name, clears the shared compilations away."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(_COMPILED, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make interop` runs the tests that open our folders with GPTQModel, transformers and PEFT."""
    parser.addoption("--run-interop", action="store_true", help="run tests/interop; needs LOTAQAF_INTEROP_PYTHON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs GPTQModel and PEFT: run `make interop`")
    for item in items:
        if "interop" in item.path.parts and not config.getoption("--run-interop"):
            item.add_marker(skip)
        if set(_OPTIMIZED).isdisjoint(item.path.parts[-3:]) and item.get_closest_marker("optimized") is None:
            item.add_marker("quick")
