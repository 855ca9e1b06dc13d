"""Fingerprint of a quantised base: an adapter names the weights that it was trained on."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os

from tqdm import tqdm

from lotaqaf_jax.errors import AdapterError
from lotaqaf_jax.quant.folder import PARTS, CheckpointFolder

__all__ = ["fingerprint"]

_THREADS = 8


def fingerprint(base: CheckpointFolder, *, progress: bool = True) -> str:
    """A hash of all that an adapter's meaning depends on: the quantised modules and how to read them.

        blake2b over, for every quantised module by name: bits, group size, format, and for each of qweight, qzeros,
        scales, g_idx: type, shape and blake2b of its bytes

    It does not depend on how the tensors are spread over shards, on the tokenizer or on the 16-bit tensors. Bytes are
    hashed from the memory-mapped files by a few threads.

    Args:
        base: the checkpoint.
        progress: show a progress bar when it takes longer than a second.

    Returns:
        ``blake2b:`` and 64 hexadecimal digits.

    Raises:
        AdapterError: nothing in ``base`` is quantised.
    """
    modules = sorted(name.removesuffix(".qweight") for name in base.tensors if name.endswith(".qweight"))
    quantization = base.quantization
    if not modules or quantization is None:
        raise AdapterError(
            f"{base.path}: nothing in it is quantised, so it cannot be the base. Pass a GPTQ checkpoint."
        )
    names = [f"{module}.{part}" for module in modules for part in PARTS if f"{module}.{part}" in base.tensors]
    total = sum(base.tensors[name].nbytes for name in names)
    threads = min(_THREADS, os.cpu_count() or 1)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="hashing the base", delay=1.0, disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):

        def digest(name: str) -> list[object]:
            entry = base.tensors[name]
            value = hashlib.blake2b(base.read(name).reshape(-1).view("u1").data, digest_size=32).hexdigest()
            bar.update(entry.nbytes)
            return [name, entry.dtype.name, list(entry.shape), value]

        digests = list(pool.map(digest, names))
    settings = []
    for module in modules:
        how = quantization.for_module(module)
        settings.append([module, None if how is None else [how.bits, how.group_size], quantization.checkpoint_format])
    text = json.dumps([settings, digests], separators=(",", ":"))
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}"
