"""A model of ours for lm-eval (EleutherAI's evaluation harness): its tasks, its prompts, its scoring.

    import lm_eval
    from lotaqaf_jax.evaluation.lm_eval import LotaLM

    results = lm_eval.simple_evaluate(LotaLM(model, tokenizer), tasks=["arc_easy", "gsm8k"])

lm-eval is not among the package's own dependencies: ``pip install 'lotaqaf_jax[eval]'``. Nothing else of the package
imports this module.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.evaluation.likelihood import Span, log_likelihoods
from lotaqaf_jax.evaluation.text_loss import prefix_token, rolling_spans
from lotaqaf_jax.generation import generate_text
from lotaqaf_jax.models import Decoder

try:
    from lm_eval.api.model import TemplateLM
except ImportError as problem:
    raise ImportError(
        "lm-eval is not installed, and lotaqaf_jax.evaluation.lm_eval needs it: pip install 'lotaqaf_jax[eval]'."
    ) from problem

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

__all__ = ["LotaLM"]

# Settings of a generation that say how tokens are chosen; requests that agree in them are generated together.
_SAMPLING = ("temperature", "top_k", "top_p")
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class LotaLM(TemplateLM):
    """A decoder as lm-eval asks for one: ``loglikelihood``, ``loglikelihood_rolling`` and ``generate_until``.

    Texts are tokenized with the tokenizer's own special tokens, as lm-eval's own class for transformers' models does by
    default. What is longer than ``max_length`` loses its beginning.

    Args:
        model: base, adapted or merged, quantised or 16-bit.
        tokenizer: the model's.
        batch_size: rows that are computed together.
        max_length: most tokens of an input; None for the model's context.
        seed: of the draws, where a task samples.
        progress: show progress bars.

    Raises:
        ConfigError: ``max_length`` is more than the model's context.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__()
        most = model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= most:
            raise ConfigError(f"max_length: found {max_length}, expected 2 to {most}, the model's context.")
        self.model = model
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length or most
        self.max_gen_toks = 256
        self._seed = seed
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context is predicted from: BOS, or EOS where there is none."""
        return prefix_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the tokenizer's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; without ``add_special_tokens``, no second BOS where the text begins with one."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        found = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return [int(token) for token in found]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is what greedy generation writes) for each request."""
        spans = []
        for _texts, context, continuation in requests:
            # The last token is no input, so that there is room for one more.
            ids = [*context, *continuation][-(self.max_length + 1) :]
            spans.append(Span(ids, max(1, len(ids) - len(continuation))))
        title = "loglikelihood" if self._progress and not disable_tqdm else None
        found = log_likelihoods(self.model, spans, batch_size=self.batch_size, progress=title)
        answers = [(one.total, bool(one.greedy.all())) for one in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, every token predicted once: :func:`.document_perplexity`'s windows."""
        texts = [request.args[0] for request in requests]
        cut = [
            rolling_spans(self.tok_encode(text, add_special_tokens=False), self.prefix_token_id, self.max_length)
            for text in texts
        ]
        title = "loglikelihood_rolling" if self._progress and not disable_tqdm else None
        spans = list(itertools.chain.from_iterable(cut))
        totals = iter(log_likelihoods(self.model, spans, batch_size=self.batch_size, progress=title))
        answers = [sum(next(totals).total for _ in pieces) for pieces in cut]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return [float(answer) for answer in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first of the texts it is to stop at.

        Greedy, unless a request's ``do_sample`` or ``temperature`` asks for draws. Generation ends at EOS, at a stop
        text that is a single token, or after ``max_gen_toks`` (256) tokens; longer stop texts are cut off afterwards.
        """
        answers = [""] * len(requests)
        by_sampling: dict[tuple[Any, ...], list[int]] = {}
        for place, request in enumerate(requests):
            settings = _sampling(request.args[1])
            by_sampling.setdefault((*settings.values(), *_stops(request.args[1])), []).append(place)
        for places in by_sampling.values():
            wanted = requests[places[0]].args[1]
            stops = _stops(wanted)
            limits = [self._limit(requests[place].args[1]) for place in places]
            contexts = [
                self.tok_encode(requests[place].args[0])[-(self.max_length - limit) :]
                for place, limit in zip(places, limits, strict=True)
            ]
            texts = generate_text(
                self.model,
                self.tokenizer,
                contexts,
                max_new_tokens=limits,
                batch_size=self.batch_size,
                eos_token_id=self._stop_tokens(stops),
                seed=self._seed,
                progress="generate_until" if self._progress and not disable_tqdm else None,
                **_sampling(wanted),
            )
            for place, text in zip(places, texts, strict=True):
                for stop in stops:
                    text = text.split(stop)[0]
                answers[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return answers

    def _limit(self, settings: dict[str, Any]) -> int:
        limit = int(next((settings[name] for name in _LIMITS if settings.get(name) is not None), self.max_gen_toks))
        if not 1 <= limit < self.max_length:
            raise ConfigError(
                f"max_gen_toks: found {limit}, expected 1 to {self.max_length - 1}, so that a context fits beside them."
            )
        return limit

    def _stop_tokens(self, stops: Sequence[str]) -> list[int]:
        """EOS, and the stop texts that are one token."""
        single = [self.tok_encode(stop, add_special_tokens=False) for stop in stops]
        return sorted({self.eot_token_id, *(ids[0] for ids in single if len(ids) == 1)})


def _stops(settings: dict[str, Any]) -> tuple[str, ...]:
    """The texts to stop at, none empty."""
    until = settings.get("until") or []
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """How tokens are chosen, as :func:`lotaqaf_jax.generation.generate_text` takes it."""
    chosen = {name: settings.get(name) for name in _SAMPLING}
    temperature = float(chosen["temperature"] or 0.0)
    if settings.get("do_sample") is False:
        temperature = 0.0
    elif settings.get("do_sample") and not temperature:
        temperature = 1.0
    top_k = chosen["top_k"]
    return {"temperature": temperature, "top_k": int(top_k) if top_k else None, "top_p": chosen["top_p"] or None}
