"""Whether other people's software loads a model folder and computes it right, said without running it."""

from convert.runtimes.folder import ModelFolder, read_folder
from convert.runtimes.table import RUNTIMES, Runtime, Verdict, check_runtime, judged

__all__ = ["RUNTIMES", "ModelFolder", "Runtime", "Verdict", "check_runtime", "judged", "read_folder"]
