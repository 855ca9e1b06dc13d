"""From a dataset's name to deterministic, resumable training batches.

``load_data(config, tokenizer, batch_size)`` does it all; the steps are one module each: :mod:`~.sources`
(names and files to rows), :mod:`~.formats` (rows to chats, completions or text), :mod:`~.template` (the chat
template and the loss mask), :mod:`~.tokenize` (ids and truncation), :mod:`~.packing` (rows of fixed length),
:mod:`~.pipeline` (order, batches, place to resume from) and :mod:`~.preview` (what a person can check).
"""

from lotaqaf_jax.data.config import DataConfig
from lotaqaf_jax.data.formats import FORMATS, Chat, Completion, Example, Message, Text
from lotaqaf_jax.data.packing import Batch
from lotaqaf_jax.data.pipeline import Batches, BatchStream, DataReport, TrainingData, load_data
from lotaqaf_jax.data.preview import preview
from lotaqaf_jax.data.sources import EXTENSIONS, PRESETS, Examples, Rows, load_examples, load_rows, make_examples
from lotaqaf_jax.data.tokenize import (
    IGNORE,
    Limits,
    Tokenized,
    TokenizedExamples,
    end_of_turn_id,
    tokenize_examples,
)

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "IGNORE",
    "PRESETS",
    "Batch",
    "BatchStream",
    "Batches",
    "Chat",
    "Completion",
    "DataConfig",
    "DataReport",
    "Example",
    "Examples",
    "Limits",
    "Message",
    "Rows",
    "Text",
    "Tokenized",
    "TokenizedExamples",
    "TrainingData",
    "end_of_turn_id",
    "load_data",
    "load_examples",
    "load_rows",
    "make_examples",
    "preview",
    "tokenize_examples",
]
