"""How fast a GPTQ checkpoint gets onto the device, beside reading its files and copying to the device.

    python benchmarks/load.py [--model qwen2.5-14b] [--layers 48] [--folder empty-or-new-folder]

Writes a checkpoint of a real model's shapes with random words, and then measures in GB/s of its files:

* reading the files into memory, by one thread and by eight. They have just been written and are in the page cache, so
  this is no figure of a disk, and loading is not slowed down by one either;
* copying one large array to the device;
* `load_decoder`, which is what train.py calls, until all arrays are ready on the device: once with compiling the few
  programs that place rows, as in a run that has never been before, and then again without. Its share is that of the
  slower of the two above, read by one thread; several threads may exceed it.

The peaks are of resident memory before and after loading the first time, so that their difference is what loading
needed beyond the start of JAX; where device and host share their memory, as on a CPU, the model is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from common import environment, layer_arguments, print_line, write_json

import convert.writing as writing
from convert.hf_config import model_config
from lotaqaf_jax.models import DecoderConfig
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.presets import preset
from lotaqaf_jax.models.spec import projection_shapes
from lotaqaf_jax.quant.folder import INDEX, CheckpointFolder
from lotaqaf_jax.quant.packing import packed_size
from lotaqaf_jax.quant.weight import group_count, trivial_g_idx

SHARD = 4e9
"""Bytes of a file, as those of the published checkpoints."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def tensor_shapes(config: DecoderConfig, bits: int, group_size: int) -> Shapes:
    """Type and shape of every tensor of a checkpoint, in the order of the layers."""
    hidden = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": ("float16", (config.vocab_size, hidden))}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = ("float16", (hidden,))
        for path, (n_in, n_out, bias) in projection_shapes(config).items():
            groups = group_count(n_in, group_size)
            shapes[f"{prefix}.{path}.qweight"] = ("int32", (packed_size(n_in, bits), n_out))
            shapes[f"{prefix}.{path}.qzeros"] = ("int32", (groups, packed_size(n_out, bits)))
            shapes[f"{prefix}.{path}.scales"] = ("float16", (groups, n_out))
            shapes[f"{prefix}.{path}.g_idx"] = ("int32", (n_in,))
            if bias:
                shapes[f"{prefix}.{path}.bias"] = ("float16", (n_out,))
    shapes["model.norm.weight"] = ("float16", (hidden,))
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = ("float16", (config.vocab_size, hidden))
    return shapes


def write_shard(path: Path, shapes: Shapes, group_size: int, seed: int) -> None:
    """Write one file. Every tensor is a few megabytes of random numbers, from a place of its own on and repeated."""
    rng = np.random.default_rng(seed)
    words = rng.integers(-(2**31), 2**31, 2**22, dtype=np.int32)
    numbers = {  # Weights of deviation 0.02, and scales that give such weights at 4 bit.
        "weight": rng.normal(0, 0.02, 2**22).astype(np.float16),
        "scales": rng.uniform(0.002, 0.006, 2**22).astype(np.float16),
    }

    def read(name: str) -> np.ndarray:
        shape = shapes[name][1]
        kind = name.rpartition(".")[2]
        if kind == "g_idx":
            return trivial_g_idx(shape[0], group_size)
        block = words if kind.startswith("q") else numbers["scales" if kind == "scales" else "weight"]
        block = block[rng.integers(len(block) // 2) :]
        count = int(np.prod(shape))
        return (block[:count] if count <= len(block) else np.resize(block, count)).reshape(shape)

    writing.write_safetensors(path, shapes, read, {"format": "pt"})


def write_checkpoint(folder: Path, config: DecoderConfig, bits: int, group_size: int) -> None:
    """Write a whole checkpoint without tokenizer; a process for every file, whose memory is not this one's."""
    shapes = tensor_shapes(config, bits, group_size)
    sizes = {name: np.dtype(kind).itemsize * int(np.prod(shape)) for name, (kind, shape) in shapes.items()}
    parts: list[list[str]] = [[]]
    for name in shapes:
        if parts[-1] and sum(sizes[other] for other in parts[-1]) + sizes[name] > SHARD:
            parts.append([])
        parts[-1].append(name)
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    quantization = {
        "bits": bits,
        "checkpoint_format": "gptq",
        "desc_act": False,
        "group_size": group_size,
        "lm_head": False,
        "quant_method": "gptq",
        "sym": False,
    }
    written = model_config(config, jnp.float16) | {"quantization_config": quantization}
    with writing.new_folder(folder, needed=sum(sizes.values())) as beside:
        workers = min(len(parts), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [
                pool.submit(write_shard, beside / file, {name: shapes[name] for name in part}, group_size, i)
                for i, (file, part) in enumerate(zip(files, parts, strict=True))
            ]
            for future in futures:
                future.result()
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        writing.write_json(beside / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        writing.write_json(beside / "config.json", written)
        writing.write_json(beside / "quantize_config.json", quantization)


@contextlib.contextmanager
def checkpoint_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder that was asked for, or one that is removed afterwards."""
    if options.folder is not None:
        yield options.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "checkpoint"


def read_files(files: list[Path], threads: int, piece: int = 2**24) -> None:
    """Read whole files, pieces of them in turn into one buffer of each thread."""
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, piece)]

    def read(thread: int) -> None:
        buffer = memoryview(bytearray(piece))
        for file, start in pieces[thread::threads]:
            with file.open("rb", buffering=0) as opened:
                opened.seek(start)
                opened.readinto(buffer)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(read, range(threads)):
            pass


def seconds(run: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_gib() -> float:
    """The most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All lines of the table."""
    opened = CheckpointFolder(folder)
    total = sum(file.stat().st_size for file in opened.shards)
    lines: list[dict[str, Any]] = []

    def add(what: str, taken: float, nbytes: int = total, **more: float) -> float:
        rate = nbytes / taken / 1e9
        lines.append({"what": what, "gb": nbytes / 1e9, "seconds": taken, "gb_per_s": rate, **more})
        return rate

    def load() -> None:
        jax.block_until_ready(jax.tree.leaves(load_decoder(CheckpointFolder(folder), options.compute_dtype)))

    raw = add("read, 1 thread", seconds(lambda: read_files(list(opened.shards), 1)))
    add("read, 8 threads", seconds(lambda: read_files(list(opened.shards), 8)))
    jnp.zeros(1).block_until_ready()  # JAX has started
    before = peak_gib()
    first, after = seconds(load), peak_gib()
    again = min(seconds(load) for _ in range(options.repeats))
    array = np.random.default_rng(0).integers(-(2**31), 2**31, options.copy_mb * 2**18, dtype=np.int32)
    jax.device_put(array).block_until_ready()
    copies = [seconds(lambda: jax.device_put(array).block_until_ready()) for _ in range(5)]
    bound = min(raw, add("copy to the device", min(copies), array.nbytes))
    peaks = {"host_peak_before_gib": before, "host_peak_after_gib": after}
    for what, taken, more in (("load_decoder", first, peaks), ("load_decoder again", again, {})):
        add(what, taken, share_of_bound=total / taken / 1e9 / bound, **more)
    return lines


def main() -> None:
    """Write a checkpoint, measure, print, write results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-14b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here; a temporary folder without")
    parser.add_argument("--reuse", action="store_true", help="measure the checkpoint that is in --folder already")
    parser.add_argument("--repeats", type=int, default=2, help="loads after the first")
    parser.add_argument("--copy-mb", type=int, default=1024, help="MiB of the array that is copied to the device")
    parser.add_argument("--compute-dtype", default="bfloat16")
    layer_arguments(parser)
    options = parser.parse_args()
    config = preset(options.model)
    if options.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    print(environment())
    with checkpoint_folder(options) as folder:
        lines: list[dict[str, Any]] = []
        if not options.reuse:
            taken = seconds(lambda: write_checkpoint(folder, config, options.bits, options.group_size))
            print_line({"written_in_s": taken})
        lines += measure(folder, options)
    for line in lines:
        print_line(line)
    write_json(options, {"lines": lines})


if __name__ == "__main__":
    main()
