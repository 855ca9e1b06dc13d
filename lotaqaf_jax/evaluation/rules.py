"""When an answer counts as right: pure functions from text to what is compared.

A rule reads a text and gives what it says in one spelling, or None where it cannot be read. A response matches when it
can be read and says what the reference says.

=======  =====================================================================================================
rule     two texts say the same if
=======  =====================================================================================================
gsm8k    the number behind ``####`` is the same (:func:`gsm8k_answer`)
viggo    function and set of attributes with their values are the same (:func:`viggo_representation`)
sql      they are the same string, but for white space at the ends
text     they are the same string, but for white space at the ends
=======  =====================================================================================================
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

__all__ = ["RULES", "Rule", "gsm8k_answer", "stripped", "viggo_representation"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A way to compare answers.

    Attributes:
        name: its name.
        reads: what it reads in a text, for messages and files.
        read: the text's answer in one spelling, or None.
    """

    name: str
    reads: str
    read: Callable[[str], str | None]

    def matches(self, response: str, reference: str) -> bool:
        """Whether both can be read and say the same."""
        expected = self.read(reference)
        return expected is not None and self.read(response) == expected


# A number may have a minus and a dollar sign, in either order, and commas between its digits.
_GSM8K = re.compile(r"####\s*(-?\$?|\$-)(?:([0-9][0-9,]*)(?:\.([0-9]+))?|\.([0-9]+))")


def gsm8k_answer(text: str) -> str | None:
    """The number behind the first ``####`` that one follows, without commas and dollar sign; None if there is none.

    Zeros that change nothing are left out: ``"... #### 1,234"`` and ``"#### $1234.00 a day"`` both give ``"1234"``.
    What comes behind the number does not count, so that a model which goes on to another question is judged by its
    first answer.

    Source: the answer format of GSM8K (arXiv 2110.14168).
    """
    found = _GSM8K.search(text)
    if found is None:
        return None
    sign, whole, *parts = found.groups()
    whole = (whole or "").replace(",", "").lstrip("0") or "0"
    part = next((part for part in parts if part), "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if "-" in sign and number != "0" else number


_FUNCTION = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
_ATTRIBUTE = re.compile(r"\s*(\w+)\s*\[([^\[\]]*)\]\s*")

# Attributes whose value is a list, by the data's own definition; the commas in others belong to a name or a date.
_LISTS = ("genres", "platforms", "player_perspective")


def viggo_representation(text: str) -> str | None:
    """A meaning representation ``function(attribute[value], ...)`` in one spelling; None if the text is not one.

    Attributes are put in order, since they are a set; of equal attributes with equal values one stays. The values of
    ``genres``, ``platforms`` and ``player_perspective`` are lists, whose items are put in order and taken once; the
    other values are strings, whose commas are left alone. White space around names, brackets and commas does not
    count, and within a value a run of it counts as one blank. Upper and lower case differ.

        inform(name[BioShock], genres[shooter, adventure])
        inform( genres[adventure,shooter] , name[BioShock] )     the same

    Nothing may stand before or behind the representation, and every bracket must be closed.

    Source: the notation of ViGGO (Juraska et al., INLG 2019).
    """
    whole = _FUNCTION.fullmatch(text)
    if whole is None:
        return None
    name, inside = whole[1], whole[2].strip()
    attributes: set[str] = set()
    place = 0
    while place < len(inside) or attributes:
        found = _ATTRIBUTE.match(inside, place)
        if found is None:
            return None
        attributes.add(f"{found[1]}[{_value(*found.groups())}]")
        place = found.end() + 1
        if found.end() == len(inside):
            break
        if inside[found.end()] != ",":
            return None
    return f"{name}({', '.join(sorted(attributes))})"


def _value(attribute: str, value: str) -> str:
    if attribute not in _LISTS:
        return " ".join(value.split())
    return ", ".join(sorted({" ".join(item.split()) for item in value.split(",")}))


def stripped(text: str) -> str:
    """The text without white space at either end: nothing else is changed, no case, quotes, blanks or semicolon."""
    return text.strip()


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("gsm8k", "the number after ####", gsm8k_answer),
        Rule("viggo", "function(attribute[value], ...)", viggo_representation),
        Rule("sql", "the query", stripped),
        Rule("text", "the text", stripped),
    )
}
"""The rules by name."""
