"""``python -m convert``: quantize, import, merge, export, verify and check from the shell."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lotaqaf_jax.errors import LotaError

if TYPE_CHECKING:
    from convert.targets import ExportReport
    from convert.verify import Report
    from lotaqaf_jax.quant.folder import CheckpointFolder

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Quantise 16-bit checkpoints, bring GPTQ checkpoints in, merge adapters into them, write them back "
        "and prove that nothing else changed. Leaves with status 0 when all went well, 2 when the input or a check is "
        "bad, 130 when interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = commands.add_parser(
        "quantize", help="16-bit folder -> GPTQ folder", description=quantize_command.__doc__
    )
    _quantize(quantize)

    merge = commands.add_parser(
        "merge",
        help="base + adapter -> merged GPTQ folder, verified before it appears",
        description=merge_command.__doc__,
    )
    _model(merge)
    merge.add_argument("--adapter", type=Path, required=True, metavar="FOLDER", help="adapter folder (required)")
    _output(merge)
    merge.add_argument(
        "--target", default="gptq", metavar="NAME", help="gptq; `export` writes the others (default: gptq)"
    )
    _report(merge)

    export = commands.add_parser(
        "export",
        help="a model, with an adapter or without -> a folder for a runtime",
        description=export_command.__doc__,
    )
    export.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="folder of `convert import`, or a GPTQ folder or hub name (required)",
    )
    export.add_argument(
        "--adapter", type=Path, metavar="FOLDER", help="adapter folder to merge on the way (default: none)"
    )
    _output(export)
    export.add_argument(
        "--target",
        metavar="NAME",
        help="format to write, docs/export.md has them in a table (default: that of the base; gptq for an imported "
        "model)",
    )
    export.add_argument(
        "--allow-lossy",
        action="store_true",
        help="write what the target cannot hold exactly too, and say how far it is off (default: refuse)",
    )
    export.add_argument(
        "--report", type=Path, metavar="FILE", help="write the report as JSON to this file (default: print it only)"
    )

    verify = commands.add_parser(
        "verify", help="check a merged folder against its base and adapter", description=verify_command.__doc__
    )
    _model(verify)
    verify.add_argument("--merged", type=Path, required=True, metavar="FOLDER", help="merged folder (required)")
    verify.add_argument(
        "--adapter",
        type=Path,
        metavar="FOLDER",
        help="adapter folder; without it logits are not compared (default: none)",
    )
    _report(verify)

    check = commands.add_parser(
        "check", help="say whether a runtime loads a folder, or why not", description=check_command.__doc__
    )
    check.add_argument("folder", type=Path, metavar="DIR", help="model folder (required)")
    check.add_argument(
        "--runtime",
        required=True,
        metavar="NAME",
        help="vllm, sglang, transformers, gptqmodel, mlx or llama.cpp (required)",
    )

    imported = commands.add_parser(
        "import", help="quantised folder -> Flax state in an Orbax checkpoint", description=import_command.__doc__
    )
    _model(imported)
    _output(imported)

    for command, run in (
        (quantize, quantize_command),
        (merge, merge_command),
        (export, export_command),
        (verify, verify_command),
        (imported, import_command),
    ):
        command.add_argument("--quiet", action="store_true", help="show no progress bars (default: show them)")
        command.set_defaults(run=run)
    check.set_defaults(run=check_command)
    return parser


def _quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", required=True, metavar="FOLDER", help="16-bit model: a folder or a hub name (required)"
    )
    command.add_argument(
        "--calibration",
        required=True,
        metavar="FILE",
        help="text that the model's inputs are taken from: .txt, .jsonl with a column `text`, or any dataset that "
        "train.py reads, each also .gz (required)",
    )
    _output(command)
    command.add_argument("--bits", type=int, default=4, metavar="N", help="2, 3, 4 or 8 (default: 4)")
    command.add_argument(
        "--group_size",
        type=int,
        default=64,
        metavar="N",
        help="input rows with a common scale and zero point, -1 for all (default: 64)",
    )
    symmetry = command.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", action="store_true", help="zero points in the middle (default: --asym)")
    symmetry.add_argument("--asym", action="store_false", dest="sym", help="zero points for each group (default)")
    command.add_argument(
        "--desc_act",
        action="store_true",
        help="act-order: rows by the size of their inputs, groups scattered (default: no)",
    )
    command.add_argument(
        "--act_group_aware",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without --desc_act: act-order that keeps groups whole (default: yes)",
    )
    command.add_argument(
        "--damp_percent",
        type=float,
        default=0.05,
        metavar="X",
        help="added to a Hessian's diagonal, as a share of its mean (default: 0.05)",
    )
    command.add_argument(
        "--grid_search",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="narrow the range of a group where that lowers its error (default: yes)",
    )
    command.add_argument(
        "--checkpoint_format",
        default="gptq",
        metavar="NAME",
        help="how zero points are stored: gptq (v1) or gptq_v2 (default: gptq)",
    )
    command.add_argument("--samples", type=int, default=256, metavar="N", help="of calibration text (default: 256)")
    command.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="tokens of a sample (default: 2048, or as many positions as the model has)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="which text is taken (default: 0)")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="base: a quantised folder (GPTQ, AWQ, compressed-tensors, MLX), a known name or a hub name (required)",
    )


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to write (required)")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the output folder if it holds a model (default: refuse)"
    )


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the tokens to compare on (default: 0)"
    )
    command.add_argument(
        "--report", type=Path, metavar="FILE", help="write the report as JSON to this file (default: print it only)"
    )


def quantize_command(args: argparse.Namespace) -> None:
    """Quantise a 16-bit Llama or Qwen2 model with GPTQ, block by block: the model need not fit the device. Embedding,
    norms, biases and head stay as they are, and so do tokenizer and generation files."""
    from convert.quantize import quantize

    report = quantize(
        args.model,
        args.output,
        calibration=args.calibration,
        bits=args.bits,
        group_size=args.group_size,
        sym=args.sym,
        desc_act=args.desc_act,
        act_group_aware=args.act_group_aware,
        damp_percent=args.damp_percent,
        grid_search=args.grid_search,
        checkpoint_format=args.checkpoint_format,
        samples=args.samples,
        length=args.length,
        seed=args.seed,
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    print(report)
    print(f"quantised model written to {args.output}")


def merge_command(args: argparse.Namespace) -> None:
    """Merge an adapter into its base and write the merged folder: the base, in its format, with only packed integers
    changed, and mu as a PEFT LoRA in offset_adapter/. It is verified where it was written; only if all checks pass does
    it appear."""
    from convert.adapter import load_adapter, training_lines
    from convert.save import check_target, merge_and_save
    from lotaqaf_jax.errors import ConfigError
    from lotaqaf_jax.models.loading import load_decoder
    from lotaqaf_jax.models.pretrained import default_dtype

    if check_target(args.target).name != "gptq":
        raise ConfigError(f"--target: merge writes gptq. `python -m convert export` writes {args.target}.")
    base = _base(args.model)
    model = load_decoder(base, default_dtype(), progress=not args.quiet)
    model = load_adapter(model, args.adapter, base=base, progress=not args.quiet)
    report = merge_and_save(
        model,
        args.output,
        base=base,
        seed=args.seed,
        training=training_lines(args.adapter),
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    _show(report, args.report)
    print(f"merged model written to {args.output}")


def verify_command(args: argparse.Namespace) -> None:
    """Reopen a merged folder and check: every integer moved by at most one step and stayed on the grid; all other
    tensors are byte-identical to the base's; with --adapter, words, mu and logits are those of the adapter model."""
    from convert.verify import verify

    base = _base(args.model)
    report = verify(base, args.merged, adapter=args.adapter, seed=args.seed, progress=not args.quiet)
    _show(report, args.report)
    print(f"verified: {args.merged}")


def check_command(args: argparse.Namespace) -> int:
    """Say, by the loader's rules and without loading weights, whether a runtime loads a model folder and computes it
    right: yes, with the flags it needs, or no, with every reason; and which export targets load. Status 0 is yes."""
    from convert.runtimes import check_runtime

    verdict = check_runtime(args.folder, args.runtime)
    print(verdict)
    return 0 if verdict.loads else 2


def import_command(args: argparse.Namespace) -> None:
    """Bring a GPTQ, AWQ, compressed-tensors or MLX folder into Flax: an Orbax checkpoint of the packed state, with
    config and tokenizer beside. Words stay packed; `export` writes them as GPTQ."""
    from convert.imported import import_checkpoint

    import_checkpoint(_base(args.model), args.output, overwrite=args.overwrite, progress=not args.quiet)
    print(f"imported model written to {args.output}")


def export_command(args: argparse.Namespace) -> None:
    """Write a model in the format of a runtime. --model is what `import` wrote, or a GPTQ folder, with the offsets that
    lie beside it; with --adapter it must be the GPTQ folder that the adapter was trained on. What is written is decoded
    and compared; a target that would lose something refuses without --allow-lossy. A LoRA does not merge; target peft
    writes it as it is."""
    from convert.adapter import load_adapter, training_lines
    from convert.imported import is_imported, load_imported
    from convert.merged import load_merged
    from convert.peft_adapter import save_lora
    from convert.save import check_target, save_pretrained
    from lotaqaf_jax.errors import ConfigError
    from lotaqaf_jax.kernels import LowRank
    from lotaqaf_jax.models import adapted_linears, merge
    from lotaqaf_jax.models.loading import load_decoder
    from lotaqaf_jax.models.pretrained import default_dtype

    imported, progress = is_imported(args.model), not args.quiet
    target = args.target or ("gptq" if imported else "base")
    check_target(target)
    if args.adapter is not None and imported:
        raise ConfigError(
            f"--adapter: {args.model} is an imported model; an adapter is merged into the GPTQ folder that it was "
            "trained on. Pass that folder as --model."
        )
    from_: dict[str, Any] = {"tokenizer_from": args.model} if imported else {"base": _base(args.model)}
    if imported:
        model = load_imported(args.model)
    elif args.adapter is not None:
        model = load_decoder(from_["base"], default_dtype(), progress=progress)
        model = load_adapter(model, args.adapter, base=from_["base"], progress=progress)
        if target == "peft" and all(isinstance(adapter, LowRank) for _, _, adapter in adapted_linears(model)):
            save_lora(model, args.output, base=from_["base"], overwrite=args.overwrite)
            print(f"LoRA written to {args.output}")
            return
        model = merge(model)
    else:
        model = load_merged(from_["base"].path, progress=progress)
    report = save_pretrained(
        model,
        args.output,
        **from_,
        target=target,
        allow_lossy=args.allow_lossy,
        training=() if args.adapter is None else training_lines(args.adapter),
        overwrite=args.overwrite,
        progress=progress,
    )
    _show(report, args.report)
    print(f"model written to {args.output}")


def _base(name: str) -> CheckpointFolder:
    from lotaqaf_jax.models import local_folder
    from lotaqaf_jax.quant.folder import CheckpointFolder

    return CheckpointFolder(local_folder(name))


def _show(report: Report | ExportReport, path: Path | None) -> None:
    print(report)
    if path is not None:
        from convert.writing import write_json

        write_json(path, report.to_dict())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except LotaError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
