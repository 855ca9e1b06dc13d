"""The settings of a run: one dataclass, its command line, and the checks that need no data."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import yaml

from lotaqaf_jax.assets import DEFAULT_RUN
from lotaqaf_jax.data import DataConfig
from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.kernels.choose import HOPPER, compute_capability
from lotaqaf_jax.lora import check_settings as check_low_rank
from lotaqaf_jax.models import KNOWN_MODELS
from lotaqaf_jax.models.adapters import TARGET_MODULES, check_targets
from lotaqaf_jax.models.pretrained import default_dtype
from lotaqaf_jax.parallel import mesh_shape
from lotaqaf_jax.ternary import Offset, Surrogate, check_settings
from lotaqaf_jax.thresholds import check_share
from lotaqaf_jax.training.adamw import Scheduler

__all__ = ["MethodName", "TrainConfig", "parse_config"]

MethodName = Literal["lota", "lora", "qalora"]
Recipe = Literal["recommended", "published"]
OptimizerName = Literal["ternary_adam", "t_signsgd"]

_LOTA: tuple[MethodName, ...] = ("lota",)
_LOW_RANK: tuple[MethodName, ...] = ("lora", "qalora")
_ONLY: dict[str, tuple[MethodName, ...]] = {
    "recipe": _LOTA,
    "optimizer": _LOTA,
    "moved": _LOTA,
    "omega": _LOTA,
    "surrogate": _LOTA,
    "offset": _LOTA,
    "offset_dtype": ("lota", "qalora"),
    "sigma_schedule": _LOTA,
    "beta": _LOTA,
    "float8": _LOTA,
    "lora_alpha": _LOW_RANK,
    "qalora_pool": ("qalora",),
    "max_grad_norm": _LOW_RANK,
    "weight_decay": _LOW_RANK,
}
"""Settings that not every method has, with the methods that do, which their help begins with."""

_RATE = ("learning_rate", "lr_scheduler_type", "warmup_ratio")
_OF_OPTIMIZERS: dict[OptimizerName, tuple[str, ...]] = {"ternary_adam": _RATE, "t_signsgd": ("sigma_schedule", "beta")}
"""Settings that only one of LoTA-QAF's optimizers has."""

_LAYOUT = (
    "data_parallel",
    "fsdp",
    "tensor_parallel",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)

TEXT_SHARE, TEXT_SHARE_3_BIT, ANSWERS_SHARE, RATE = 0.04, 0.02, 0.15, 0.2
"""Of the recommended recipe: the share of entries that pass the threshold, on plain text and on rows with answers, and
ternary_adam's learning rate."""


def _help(text: str, default: Any) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class TrainConfig:
    """Settings of a training run; every field is a flag of ``train.py``."""

    method: MethodName = _help(
        "lota: ternary adapters, which move integers; lora: adapters in 16 bit beside the model, which may be one of "
        "16 bit itself; qalora: adapters of groups, which shift zero points",
        "lota",
    )
    model: str | None = _help(
        "folder, hub name or known name of a GPTQ checkpoint; none: the shipped small model", None
    )
    dataset: str | None = _help("file, folder, hub name or preset (alpaca, gsm8k, sql, viggo; also preset:path)", None)
    output_dir: str = _help("where adapter, merged model and logs are written", "output")
    overwrite_output_dir: bool = _help(
        "replace an output_dir that is not empty; with resume_from_checkpoint only where it holds no checkpoint", False
    )
    eval_dataset: str | None = _help("held-out rows, named as dataset", None)
    dataset_format: str | None = _help("format of the rows; none: by their columns", None)
    max_samples: int | None = _help("use only the first so many rows", None)
    max_eval_samples: int | None = _help("the same for eval_dataset", None)
    val_size: float = _help("rows held out of dataset: a count, or a share below 1", 0.0)
    skip_bad_rows: bool = _help("leave out rows that cannot be used, and count them", False)
    max_seq_length: int = _help("most tokens of an example, and of a packed row", 1280)
    max_source_length: int | None = _help("most tokens of a prompt; the paper's 1024", None)
    max_target_length: int | None = _help("most tokens of a response; the paper's 256", None)
    packing: bool = _help("put several examples into a row; they do not see each other", False)

    lora_r: int | None = _help("rank of the adapters; none: the paper's for the model, or 64", None)
    recipe: Recipe = _help(
        "lota: what optimizer, surrogate, offset and threshold are where they are not given; recommended: "
        f"ternary_adam, window, none and --moved {TEXT_SHARE} on plain text ({TEXT_SHARE_3_BIT} at 3 bit), "
        f"{ANSWERS_SHARE} on rows with answers; published: t_signsgd, straight, reference and --omega 0.75 * lora_r",
        "recommended",
    )
    optimizer: OptimizerName | None = _help(
        "lota: ternary_adam collects small steps until a value flips, t_signsgd flips the largest gradients' values; "
        "none: the recipe's",
        None,
    )
    moved: float | None = _help(
        "lota: share of the integers that may move: sets the threshold on |A@B| of every matrix anew in every step; "
        "none: the recipe's, unless omega is given",
        None,
    )
    omega: float | None = _help(
        "lota: threshold on |A@B| above which an integer moves, the same for all matrices; none: by moved", None
    )
    surrogate: Literal["straight", "window"] | None = _help(
        "lota: gradient through the threshold; straight: as if it were not there, window: most of it from entries near "
        "it; none: the recipe's",
        None,
    )
    offset: Literal["reference", "paper", "none"] | None = _help(
        "lota: rule of the zero-point offset mu; left out: the recipe's", None
    )
    offset_dtype: Literal["float32", "float16", "bfloat16"] = _help(
        "lota, qalora: type that mu is stored in", "float32"
    )
    lora_alpha: float | None = _help("lora, qalora: A@B is multiplied by lora_alpha / lora_r; none: 2 * lora_r", None)
    qalora_pool: Literal["sum", "mean"] = _help(
        "qalora: what is made of the inputs of a group; sum: as published, mean: the authors' code", "sum"
    )
    target_modules: list[str] = _help(
        "projections to adapt",
        list(TARGET_MODULES),
    )
    sigma_schedule: Literal["reference", "paper"] = _help(
        "lota: schedule of the gradient quantile of t_signsgd", "reference"
    )
    beta: float = _help("lota: t_signsgd averages gradients over steps before sign and quantile; 0: as published", 0.0)
    learning_rate: float | None = _help(
        f"of AdamW and ternary_adam; none: for lota {RATE}, where 1 is the way from one ternary value to the next; for "
        "lora and qalora the published 5e-4, or 1e-4 for known models of 32B and more, on alpaca 1e-5 and 5e-6",
        None,
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] | None = _help(
        "what the learning rate does after the warmup: stay, or fall to 0 at the last step; none: cosine for lota, "
        "constant for lora and qalora",
        None,
    )
    warmup_ratio: float = _help("share of the steps over which the learning rate rises from 0", 0.0)
    max_grad_norm: float = _help(
        "lora, qalora: gradients are scaled down to this norm over all adapters; 0: never", 0.3
    )
    weight_decay: float = _help("lora, qalora: AdamW's, times the learning rate", 0.0)

    data_parallel: int | None = _help("copies of the model, each with rows of its own; none: 1", None)
    fsdp: int | None = _help(
        "parts that a copy is stored in, on devices with rows of their own; none: as many as devices are left", None
    )
    tensor_parallel: int | None = _help("devices that share the computation of a row; none: 1", None)
    per_device_train_batch_size: int = _help(
        "rows that a device computes at once, or the devices of tensor_parallel together", 8
    )
    per_device_eval_batch_size: int | None = _help("the same in evaluation; none: as in training", None)
    gradient_accumulation_steps: int | None = _help(
        "batches summed up before an update; none: 1, or for a known model what makes the published 64 rows", None
    )
    num_train_epochs: float = _help("times through the data", 1.0)
    max_steps: int = _help("updates in all, in place of num_train_epochs; -1: by epochs", -1)
    gradient_checkpointing: bool = _help("recompute activations in the backward pass to save memory", True)
    recompute: Literal["auto", "block", "products"] = _help(
        "what gradient_checkpointing recomputes: all of a block, or all but its matrix products; auto: as little as "
        "fits the GPU's memory, block elsewhere",
        "auto",
    )
    float8: bool | None = _help(
        "lota: in bfloat16, round to 8 bits for the one product behind the adapters' gradients; none: on GPUs from "
        "Hopper on, where it is faster",
        None,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _help("type that is computed in; auto: by device", "auto")
    seed: int = _help("decides adapters and order of the data", 0)

    logging_steps: int = _help("steps between log lines", 1)
    eval_steps: int = _help("steps between looks at the held-out rows; 0: only before and after", 0)
    save_steps: int = _help("steps between checkpoints; 0: only when stopped", 0)
    save_total_limit: int = _help("checkpoints to keep", 2)
    resume_from_checkpoint: str | None = _help(
        "'auto': go on from the newest checkpoint of output_dir, or begin where there is none, so that one command "
        "line does for the start and after every kill; 'latest': the newest, and an error where there is none; or a "
        "folder below output_dir/checkpoints",
        None,
    )
    report_to: Literal["none", "tensorboard", "wandb"] = _help(
        "where to send the log besides trainer_log.jsonl", "none"
    )
    dry_run: bool = _help("print settings, data and some tokens with their loss mask, then stop", False)
    skip_memory_check: bool = _help("on a GPU, try a run that is estimated not to fit its memory", False)

    def __post_init__(self) -> None:
        minimum = {
            "per_device_train_batch_size": 1,
            "logging_steps": 1,
            "eval_steps": 0,
            "save_steps": 0,
            "save_total_limit": 1,
        }
        if self.gradient_accumulation_steps is not None:
            minimum["gradient_accumulation_steps"] = 1
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name}: found {getattr(self, name)}, expected {least} or more.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigError(f"--max_steps: found {self.max_steps}, expected 1 or more, or -1 to go by epochs.")
        if self.num_train_epochs <= 0:
            raise ConfigError(f"--num_train_epochs: found {self.num_train_epochs}, expected more than 0.")
        if self.float8 and self.dtype == "float32":
            raise ConfigError("--float8: found true with --dtype float32, expected bfloat16; leave one of them out.")
        for name in ("beta", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name}: found {getattr(self, name)}, expected 0 <= {name} < 1.")
        for name in ("max_grad_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"--{name}: found {getattr(self, name)}, expected 0 or more.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning_rate: found {self.learning_rate}, expected more than 0.")
        if self.model is not None and self.dataset is None:
            raise ConfigError("--dataset is missing. Name the file, folder, hub name or preset to train on.")
        given = [f.name for f in dataclasses.fields(self) if f.default != getattr(self, f.name)]
        check_method(self.method, given)
        if self.method == "lota":
            self._check_lota(given)
        else:
            check_low_rank(self.rank, self.alpha)
        check_targets(self.target_modules)

    def _check_lota(self, given: Sequence[str]) -> None:
        if self.moved is not None and self.omega is not None:
            raise ConfigError("--moved and --omega both set the threshold; leave one of them out.")
        for optimizer, names in _OF_OPTIMIZERS.items():
            for name in names:
                if name in given and self.ternary_optimizer != optimizer:
                    raise ConfigError(
                        f"--{name}: is a setting of --optimizer {optimizer}, found with {self.ternary_optimizer}. "
                        f"Leave it out, or pass --optimizer {optimizer}."
                    )
        if self.share is not None:
            check_share(self.share)
        check_settings(self.rank, self.threshold, self.offset_rule, self.gradient)

    @property
    def accumulation(self) -> int:
        """``gradient_accumulation_steps``, or what makes a known model's published batch, or 1."""
        if self.gradient_accumulation_steps is not None:
            return self.gradient_accumulation_steps
        known = KNOWN_MODELS.get(str(self.model).lower())
        return max(1, known.batch_size // (self.per_device_train_batch_size * self.row_shards)) if known else 1

    @property
    def mesh_shape(self) -> tuple[int, int, int]:
        """Sizes of the mesh axes data, fsdp and tensor over the devices that JAX has.

        Raises:
            ConfigError: they do not make up that many devices.
        """
        return mesh_shape(jax.device_count(), self.data_parallel, self.fsdp, self.tensor_parallel)

    @property
    def row_shards(self) -> int:
        """Into how many parts the mesh cuts the rows of a batch."""
        return self.mesh_shape[0] * self.mesh_shape[1]

    @property
    def train_batch_size(self) -> int:
        """Rows of one update."""
        return self.per_device_train_batch_size * self.accumulation * self.row_shards

    @property
    def eval_batch_size(self) -> int:
        """Rows of one evaluation batch."""
        return (self.per_device_eval_batch_size or self.per_device_train_batch_size) * self.row_shards

    @property
    def rank(self) -> int:
        """``lora_r``, or the published rank for a model that is known, or 64."""
        if self.lora_r is not None:
            return self.lora_r
        known = KNOWN_MODELS.get(str(self.model).lower())
        return known.rank if known else 64

    @property
    def compute_dtype(self) -> Any:
        """The type that is computed in."""
        return default_dtype() if self.dtype == "auto" else self.dtype

    @property
    def takes_float8(self) -> bool:
        """Whether the adapters' gradients come from a product of float8 numbers."""
        wanted = (compute_capability() or (0, 0)) >= HOPPER if self.float8 is None else self.float8
        return self.method == "lota" and wanted and jnp.dtype(self.compute_dtype) == jnp.bfloat16

    @property
    def ternary_optimizer(self) -> OptimizerName:
        """``optimizer``, or the recipe's."""
        return self.optimizer or ("ternary_adam" if self.recipe == "recommended" else "t_signsgd")

    @property
    def gradient(self) -> Surrogate:
        """``surrogate``, or the recipe's."""
        return self.surrogate or ("window" if self.recipe == "recommended" else "straight")

    @property
    def offset_rule(self) -> Offset:
        """``offset``, or the recipe's."""
        return self.offset or ("none" if self.recipe == "recommended" else "reference")

    @property
    def share(self) -> float | None:
        """``moved``, or the recipe's, on plain text at 4 bit unless :meth:`settled`; None where omega is a number."""
        if self.moved is not None:
            return self.moved
        return TEXT_SHARE if self.recipe == "recommended" and self.omega is None else None

    @property
    def threshold(self) -> float:
        """``omega``, or the published 0.75 * rank; the least that is possible where :attr:`share` sets it."""
        if self.share is not None:
            return 1.0
        return 0.75 * self.rank if self.omega is None else self.omega

    @property
    def scheduler(self) -> Scheduler:
        """``lr_scheduler_type``, or the method's."""
        return self.lr_scheduler_type or ("cosine" if self.method == "lota" else "constant")

    @property
    def alpha(self) -> float:
        """``lora_alpha``, or the published 2 * rank."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def peak_rate(self) -> float:
        """``learning_rate``, or the recommended one, or the published one for the model's size and the data."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.method == "lota":
            return RATE
        known = KNOWN_MODELS.get(str(self.model).lower())
        large = known is not None and known.large
        if str(self.dataset).partition(":")[0] == "alpaca":
            return 5e-6 if large else 1e-5
        return 1e-4 if large else 5e-4

    def settled(self, data_format: str, bits: int) -> TrainConfig:
        """These settings, with what the recommended recipe makes of data and model: ``moved``, where it is left out.

        To go on with text that the model knows takes few integers, a task that is new to it more. At 3 bit a step of
        the grid is already large, while little is broken that text must mend, as it is at 2 bit (docs/results.md).

        Args:
            data_format: name of the rows' format, as ``DataReport.format`` has it.
            bits: width of the model's integers, of most of them where they differ.
        """
        if self.method != "lota" or self.moved is not None or self.share is None:
            return self
        on_text = TEXT_SHARE_3_BIT if bits == 3 else TEXT_SHARE
        return dataclasses.replace(self, moved=on_text if data_format == "text" else ANSWERS_SHARE)

    def data(self) -> DataConfig:
        """The settings of the data room among these."""
        return DataConfig(
            dataset=str(self.dataset),
            format=self.dataset_format,
            eval_dataset=self.eval_dataset,
            val_size=self.val_size,
            max_samples=self.max_samples,
            max_eval_samples=self.max_eval_samples,
            max_seq_length=self.max_seq_length,
            max_source_length=self.max_source_length,
            max_target_length=self.max_target_length,
            packing=self.packing,
            skip_bad_rows=self.skip_bad_rows,
            seed=self.seed,
        )

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the numbers of a run; a resumed run must have the same."""
        passing = {
            "output_dir", "overwrite_output_dir", "per_device_eval_batch_size", "logging_steps", "eval_steps",
            "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to", "dry_run", "skip_memory_check",
        }  # fmt: skip
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in passing | set(_LAYOUT)}
        return kept | {"train_batch_size": self.train_batch_size}

    def layout(self) -> dict[str, Any]:
        """How the rows of an update are spread over devices and time, which decides the order of sums alone."""
        return {
            "mesh": list(self.mesh_shape),
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.accumulation,
        }

    def differences(self, then: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
        """Where these settings decide otherwise than those of an earlier run: "name: 1 then, 2 now" for each.

        Args:
            then: what :meth:`decisive` gave, perhaps in a release that did not have all settings yet: those are what
                they are without being given.
            ignore: names that are not compared.
        """
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        if "per_device_train_batch_size" in then:  # Written before there were meshes.
            rows = then["per_device_train_batch_size"] * (then["gradient_accumulation_steps"] or 1)
            then = {**then, "train_batch_size": rows}
        pairs = {key: ({**defaults, **then}.get(key), now) for key, now in self.decisive().items() if key not in ignore}
        return [f"{key}: {was!r} then, {now!r} now" for key, (was, now) in pairs.items() if was != now]


def check_method(method: MethodName, given: Iterable[str]) -> None:
    """Refuse settings that a method does not have.

    Args:
        method: the method.
        given: names of the settings that were given.

    Raises:
        ConfigError: names the first that belongs to other methods.
    """
    for name, only in _ONLY.items():
        if name in given and method not in only:
            raise ConfigError(
                f"--{name}: is a setting of --method {' or '.join(only)}, found with --method {method}. Leave it out."
            )


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Read the command line: ``--config file.yaml`` first, flags on top; without a model, the shipped run below both.

    Args:
        argv: arguments without the program's name.

    Raises:
        ConfigError: an unknown key in the file, or a value out of range.
        SystemExit: status 2 for a malformed command line, as argparse does; 0 for ``--help``.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(TrainConfig, allow_abbrev=False)
    parser.add_argument("--config", default=None, help="YAML file of these settings; flags win over it")
    parser.prog = "train.py"
    parser.description = (
        "Fine-tune a GPTQ model with ternary adapters, merge them without rounding, write it back; or train LoRA or "
        "QA-LoRA in the same way, to compare with."
    )
    given = parser.parse_args(list(argv))
    settings = [] if given.config is None else _as_flags(_read_yaml(Path(given.config)), given.config)
    named = parser.parse_args([*settings, *argv])
    check_method(named.method, _given([*settings, *argv]))
    if named.model is None and named.dataset is None:
        shipped = DEFAULT_RUN / "train.yaml"
        defaults = {
            key: value for key, value in _read_yaml(shipped).items() if named.method in _ONLY.get(key, (named.method,))
        }
        for key in ("model", "dataset", "eval_dataset"):
            defaults[key] = str(DEFAULT_RUN / defaults[key])
        settings = [*_as_flags(defaults, str(shipped)), *settings]
    elif named.model is None:
        raise ConfigError("--model is missing. Name the folder of a GPTQ checkpoint, or a known model.")
    values = vars(parser.parse_args([*settings, *argv]))
    values.pop("config")
    return TrainConfig(**values)


def _given(flags: Iterable[str]) -> set[str]:
    """Names of the settings among command-line arguments."""
    return {flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ConfigError(f"--config {path}: not valid YAML: {problem}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"--config {path}: found a {type(parsed).__name__}, expected settings as 'name: value'.")
    return parsed


def _as_flags(settings: Mapping[str, Any], where: str) -> list[str]:
    """Settings of a file as the flags they stand for, so that they are read and checked the same way."""
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    flags: list[str] = []
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{where}: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        if value is None:
            continue
        flags += [f"--{key}", *([str(item) for item in value] if isinstance(value, list) else [str(value)])]
    return flags
