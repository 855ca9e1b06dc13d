"""Loading a large checkpoint holds the model and little else: at most its largest tensor and a tenth of its size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lotaqaf_jax.models import DecoderConfig
from lotaqaf_jax.models.spec import projection_shapes

LAYERS, SHARDS = 32, 3
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "rope_theta": 10000.0,
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}

# Run in its own process: what this one has allocated before would hide what loading does.
SCRIPT = """
import json, sys, threading, time
import jax
from lotaqaf_jax.models import load_pretrained

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

small, large = sys.argv[1:]
load_pretrained(small, progress=False)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_pretrained(large, progress=False)
done.set()
watcher.join()
from flax import nnx
held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print(json.dumps({"peak": peak - before, "after": anonymous() - before, "held": held}))
"""


def write_checkpoint(folder: Path, layers: int) -> tuple[int, int]:
    """A GPTQ checkpoint of random words in shards; returns the bytes of all tensors and of the largest."""
    rng = np.random.default_rng(0)
    config = CONFIG | {"num_hidden_layers": layers}
    hidden = CONFIG["hidden_size"]
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": np.ones((CONFIG["vocab_size"], hidden), np.float16),
        "lm_head.weight": np.ones((CONFIG["vocab_size"], hidden), np.float16),
        "model.norm.weight": np.ones(hidden, np.float16),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(hidden, np.float16)
        for path, (n_in, n_out, _) in projection_shapes(DecoderConfig.from_hf(config)).items():
            words = rng.integers(-(2**31), 2**31, (n_in // 8, n_out), dtype=np.int32)
            zeros = rng.integers(-(2**31), 2**31, (n_in // 128, n_out // 8), dtype=np.int32)
            tensors |= {
                f"{prefix}.{path}.qweight": words,
                f"{prefix}.{path}.qzeros": zeros,
                f"{prefix}.{path}.scales": np.ones((n_in // 128, n_out), np.float16),
                f"{prefix}.{path}.g_idx": np.arange(n_in, dtype=np.int32) // 128,
            }
    names = list(tensors)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [array.nbytes for array in tensors.values()]
    return sum(sizes), max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux's /proc")
def test_peak_host_memory(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    write_checkpoint(small, 2)
    total, largest = write_checkpoint(large, LAYERS)
    assert total > 200e6
    command = [sys.executable, "-c", SCRIPT, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Sizes of the groups' zeros and of the index differ from the file's, so the model's own size is what counts.
    assert 0.9 * total < found["held"] < 1.1 * total
    assert found["peak"] > 0.9 * found["held"], "the samples missed the load"
    beyond = found["peak"] - found["held"]
    assert beyond <= largest + 0.1 * total, f"{beyond / 1e6:.0f} MB beyond the model of {found['held'] / 1e6:.0f} MB"
