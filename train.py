"""Fine-tune a GPTQ model with ternary adapters and write a GPTQ model back.

    python train.py                                              the small model that is shipped, on its own data
    python train.py --model qwen2.5-14b-gptq --dataset gsm8k     a known model; a folder or hub name works too
    python train.py --config settings.yaml --omega 16            settings of a file, flags on top
    python train.py ... --save_steps 100 --resume_from_checkpoint auto     to be started again whenever it was killed
    python train.py --method lora ...                            a baseline: lora or qalora in place of ternary adapters
    python train.py --help                                       all settings

Writes output_dir/adapter (the ternary adapters), output_dir/merged (a GPTQ folder in which only integers moved),
output_dir/trainer_log.jsonl and output_dir/training_loss.png. With --method lora the adapter is a folder for PEFT, and
nothing is merged; with --method qalora zero points are shifted, and no integer moves. Exit status: 0; 2 for an error,
told in a sentence; 128 + n when signal n stopped the run.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import convert
from convert.writing import clear_leftovers
from lotaqaf_jax.data import load_data, preview
from lotaqaf_jax.errors import LotaError
from lotaqaf_jax.evaluation import evaluate
from lotaqaf_jax.models import Decoder, local_folder
from lotaqaf_jax.models.loading import load_decoder
from lotaqaf_jax.models.pretrained import load_tokenizer
from lotaqaf_jax.parallel import make_mesh, shard
from lotaqaf_jax.parallel.processes import is_main, start
from lotaqaf_jax.plan import about_run
from lotaqaf_jax.quant.folder import CheckpointFolder
from lotaqaf_jax.training import Stopped, TrainConfig, method_of, parse_config, prepare_output, summary, train
from lotaqaf_jax.training.compilation import use_compilation_cache
from lotaqaf_jax.training.log import plot_log, read_log


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into a sentence and an exit status."""
    try:
        start()
        run(parse_config(sys.argv[1:] if argv is None else argv))
    except LotaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full ({problem}). Free some space; whole checkpoints stay.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted outside of training; no folder is left half written", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(
            f"stopped after step {stopped.step}; a checkpoint is written. Go on with the same command and "
            "--resume_from_checkpoint latest",
            file=sys.stderr,
        )
        return stopped.status
    return 0


def run(config: TrainConfig) -> None:
    """The job: load -> train -> merge -> export -> verify."""
    started = time.perf_counter()
    output = Path(config.output_dir)
    use_compilation_cache()

    # Load: data first, since it is quick and most mistakes are there.
    base = CheckpointFolder(local_folder(str(config.model)))
    tokenizer = load_tokenizer(base.path)
    sizes = (config.train_batch_size, config.eval_batch_size)
    data = load_data(config.data(), tokenizer, *sizes, progress=is_main())
    config = config.settled(data.report.format, base.quantization.default.bits if base.quantization else 16)
    about = about_run(config, base, data.report.row_length)  # on a GPU: memory and time, or that it cannot fit
    settings = summary(config, data.num_steps(config.num_train_epochs))
    if is_main():
        print(settings, *about, data.report, sep="\n")
    if config.dry_run:
        if is_main():
            print(preview(data.train, tokenizer, color=sys.stdout.isatty()))
        return
    prepare_output(config)
    if is_main():
        for name in ("adapter", "merged"):
            clear_leftovers(output / name)
    method = method_of(config)
    place = None
    if jax.device_count() > 1:
        place = functools.partial(shard, mesh=make_mesh(*config.mesh_shape))
    model = method.adapt(load_decoder(base, config.compute_dtype, place=place, progress=is_main()), config)

    # Train, with a look at the held-out rows before and after.
    def held_out(model: Decoder, title: str) -> dict[str, float]:
        batches = data.validation or []
        return dataclasses.asdict(evaluate(model, batches, progress=title if is_main() else None, total=len(batches)))

    model = train(model, data, config, evaluate=held_out if data.validation else None)

    # Merge, export and verify: integers move by one step of their grid or not at all, nothing is rounded, and the
    # merged folder appears in its place only when it has been read back and every check has passed.
    told = f"{settings}\n{data.report}".splitlines()
    writing: Any = {"base": base, "training": told, "overwrite": True, "progress": is_main()}
    convert.save_adapter(model, output / "adapter", **writing)
    if method.merges:
        report = convert.merge_and_save(model, output / "merged", **writing)
        if is_main():
            print(report)
    if not is_main():
        return
    plot_log(output / "trainer_log.jsonl", output / "training_loss.png")

    looks = [record for record in read_log(output / "trainer_log.jsonl") if "eval_loss" in record]
    if looks:
        before, after = looks[0], looks[-1]
        exact = (100 * before["eval_exact_match"], 100 * after["eval_exact_match"], after["eval_rows"])
        print(f"held-out loss          {before['eval_loss']:.4f} -> {after['eval_loss']:.4f} nats per token")
        print("held-out exact match   {:.1f} % -> {:.1f} % of {} rows".format(*exact))
    print(f"adapter                {output / 'adapter'}")
    if method.merges:
        print(f"merged model           {output / 'merged'}")
    else:
        print("merged model           none: the grid of the integers would round a LoRA; load it beside the base")
    print(f"log and plot           {output / 'trainer_log.jsonl'}, {output / 'training_loss.png'}")
    print(f"time                   {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
