"""Whether other people's software loads a model folder and computes it right, said without running it."""

from convert.runtimes.table import RUNTIMES, Runtime, Verdict, check_runtime

__all__ = ["RUNTIMES", "Runtime", "Verdict", "check_runtime"]
