"""What we write loads in GPTQModel and in transformers with PEFT, and computes there what it computes here."""

from __future__ import annotations

import numpy as np
import pytest

from tests.interop.conftest import CASES, QUANTIZED, Case, Opened

# Largest difference of logits per unit of their mean size. transformers computes in float32, but dequantises in
# float16; GPTQModel runs in float16 throughout.
TOLERANCE = {"transformers": 0.01, "dense": 1e-3, "gptqmodel": 0.03}
# The unmodified base differs too, on the same path: what we wrote may not be worse than that by more than this factor.
# In float16 the LoRA beside it rounds too, and which processor computes matters by a third.
SLACK, EXACT = {"transformers": 1.5, "dense": 1.5, "gptqmodel": 2.0}, 1e-4


def distance(ours: np.ndarray, theirs: np.ndarray | str) -> float:
    assert not isinstance(theirs, str), theirs
    return float(np.max(np.abs(ours - theirs)) / np.mean(np.abs(ours)))


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in CASES for kind in case.kinds],
    ids=lambda value: getattr(value, "name", value),
)
def test_client_computes_our_logits(opened: dict[str, Opened], case: Case, kind: str) -> None:
    """Of a merged model with its offsets, or of a base with a LoRA."""
    if case.name not in opened:
        pytest.skip("the base is in the shared folder, which is absent")
    found = opened[case.name]
    base = distance(found.ours["base"], found.theirs["base", kind])
    merged = distance(found.ours["merged"], found.theirs["merged", kind])
    print(f"{case.name} {kind}: base {base:.2e}, merged {merged:.2e}")
    assert merged <= TOLERANCE[kind]
    assert merged <= max(SLACK[kind] * base, EXACT)
    # The check can see an adapter that was not applied: base and merged model are far apart on this scale.
    assert distance(found.ours["base"], found.ours["merged"]) > 4 * merged


@pytest.mark.parametrize("kind", ["transformers", "gptqmodel"])
def test_checkpoint_written_from_a_model_alone(opened: dict[str, Opened], kind: str) -> None:
    found = opened["written"]
    assert distance(found.ours["merged"], found.theirs["merged", kind]) <= TOLERANCE[kind]


@pytest.mark.parametrize("kind", ["transformers", "gptqmodel"])
@pytest.mark.parametrize("name", [name for name, *_ in QUANTIZED])
def test_what_we_quantised(opened: dict[str, Opened], name: str, kind: str) -> None:
    found = opened[name]
    here = distance(found.ours["merged"], found.theirs["merged", kind])
    print(f"{name} {kind}: {here:.2e}")
    assert here <= TOLERANCE[kind]
    # The check can see other weights: quantising moved the logits further.
    assert distance(found.ours["base"], found.ours["merged"]) > 2 * here
