"""The toy world of the default model: messages to an order desk, and the notations its departments keep them in.

A message says what a customer wants (order, cancel, return, ask) and gives some of seven details. Each department
writes the same facts in a notation of its own, made of three choices: how the whole is wrapped, how a detail is
paired with its value, and what joins the pairs. The model is pretrained on the notations of :data:`DEPARTMENTS` and
fine-tuned on that of :data:`NEW_DEPARTMENT`, every piece of which it has seen, but never together.

All words are listed here; everything is drawn from one seeded generator.
"""

from __future__ import annotations

import dataclasses
import random

__all__ = [
    "DEPARTMENTS",
    "DETAILS",
    "NEW_DEPARTMENT",
    "Notation",
    "Order",
    "draw_message",
    "draw_order",
    "plain",
]

DETAILS = ("item", "count", "size", "colour", "customer", "city", "day")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


INTENTS = ("order", "cancel", "return", "ask")
ITEMS = _words(
    "lamp chair table shelf mirror pillow blanket curtain carpet vase candle basket bucket kettle teapot cup bowl "
    "plate spoon fork jug pan pot tray shirt jacket coat scarf hat belt sock boot pencil ruler notebook folder stamp "
    "bag tent rope hammer saw drill ladder pump tile pipe bell"
)
COUNTS = _words("two three four five six seven eight nine ten eleven twelve twenty")
SIZES = _words("tiny small medium large huge")
COLOURS = _words("red blue green yellow black white grey brown orange purple pink silver")
CUSTOMERS = _words(
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jonas Karin Leo Mira Nils Olga Paul Rosa Simon Tara Ugo "
    "Vera Walter Yara Zeno"
)
CITIES = _words(
    "Oslo Rome Paris Vienna Berlin Madrid Lisbon Dublin Athens Prague Warsaw Geneva Naples Turin Bergen Porto Riga "
    "Cairo Delhi Tokyo"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_OPENINGS = {
    "order": (
        "I would like {np}{more}.",
        "Please send {np}{more}.",
        "We need {np}{more}.",
        "Can I order {np}{more}?",
        "Put {np} on the list{more}.",
        "{np} please{more}.",
    ),
    "cancel": (
        "Please cancel {np}{more}.",
        "Forget about {np}{more}.",
        "I no longer want {np}{more}.",
        "Take {np} off the list{more}.",
        "We do not need {np} any more{more}.",
    ),
    "return": (
        "I want to send back {np}{more}.",
        "We return {np}{more}.",
        "Please pick up {np} again{more}.",
        "Take back {np}{more}.",
    ),
    "ask": (
        "Do you have {np}{more}?",
        "Could you still get {np}{more}?",
        "How long does it take to get {np}{more}?",
        "What is the price of {np}{more}?",
    ),
}


@dataclasses.dataclass(frozen=True)
class Order:
    """What one message says: the intent, and the details that are given, in the order of :data:`DETAILS`."""

    intent: str
    details: tuple[tuple[str, str], ...]

    def get(self, detail: str) -> str | None:
        """The value of a detail, or None where it is not given."""
        return dict(self.details).get(detail)


@dataclasses.dataclass(frozen=True)
class Notation:
    """A way to write an order: ``wrap`` around ``join`` of ``pair`` for every detail."""

    wrap: str
    pair: str
    join: str

    def write(self, order: Order) -> str:
        """The order in this notation."""
        pairs = self.join.join(self.pair.format(k=detail, v=value) for detail, value in order.details)
        return self.wrap.format(i=order.intent, p=pairs)


_WRAPS = {"call": "{i}({p})", "colon": "{i}: {p}", "tag": "[{i}] {p}", "brace": "{i} {{{p}}}", "arrow": "{i} > {p}"}
_PAIRS = {"equal": "{k}={v}", "colon": "{k}:{v}", "square": "{k}[{v}]", "angle": "{k}<{v}>", "quote": '{k}"{v}"'}
_JOINS = {"comma": ", ", "semicolon": "; ", "bar": " | ", "plus": " + "}


def _notation(wrap: str, pair: str, join: str) -> Notation:
    return Notation(_WRAPS[wrap], _PAIRS[pair], _JOINS[join])


DEPARTMENTS = {
    "warehouse": _notation("call", "equal", "comma"),
    "billing": _notation("colon", "colon", "semicolon"),
    "shop": _notation("tag", "square", "bar"),
    "kitchen": _notation("brace", "angle", "plus"),
    "garage": _notation("arrow", "quote", "comma"),
    "office": _notation("call", "colon", "bar"),
    "factory": _notation("colon", "square", "plus"),
    "studio": _notation("tag", "angle", "comma"),
    "harbour": _notation("brace", "quote", "semicolon"),
    "station": _notation("arrow", "equal", "bar"),
    "market": _notation("call", "angle", "semicolon"),
    "library": _notation("colon", "quote", "bar"),
    "museum": _notation("tag", "equal", "plus"),
    "school": _notation("brace", "square", "comma"),
    "clinic": _notation("arrow", "colon", "plus"),
    "theatre": _notation("call", "quote", "plus"),
    "airport": _notation("colon", "angle", "comma"),
    "hotel": _notation("tag", "colon", "semicolon"),
    "bakery": _notation("brace", "equal", "bar"),
    "garden": _notation("arrow", "square", "semicolon"),
}

NEW_DEPARTMENT = ("archive", _notation("call", "square", "comma"))


def draw_order(rng: random.Random) -> Order:
    """An order with an item and, each about half of the time, the other details."""
    drawn = {
        "item": rng.choice(ITEMS),
        "count": rng.choice(COUNTS),
        "size": rng.choice(SIZES),
        "colour": rng.choice(COLOURS),
        "customer": rng.choice(CUSTOMERS),
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    kept = {"item"} | {detail for detail in DETAILS if rng.random() < 0.5}
    return Order(rng.choice(INTENTS), tuple((detail, drawn[detail]) for detail in DETAILS if detail in kept))


def plain(order: Order) -> str:
    """The order in a few plain words, always the same for the same order."""
    more = [
        f" {word} {order.get(d)}" for d, word in (("customer", "for"), ("city", "in"), ("day", "on")) if order.get(d)
    ]
    return f"{order.intent} {_noun_phrase(order, plural=False)}{''.join(more)}"


def draw_message(order: Order, rng: random.Random) -> str:
    """A sentence that a customer might have written to say ``order``."""
    given = dict(order.details)
    more = []
    if "customer" in given:
        more.append(f" for {given['customer']}")
    if "city" in given:
        more.append(f" {rng.choice(('in', 'to'))} {given['city']}")
    if "day" in given:
        more.append(f" {rng.choice(('on', 'by', 'before'))} {given['day']}")
    rng.shuffle(more)
    front = more.pop().strip() if more and rng.random() < 0.2 else ""
    phrase = _noun_phrase(order, plural=rng.random() < 0.5)
    sentence = rng.choice(_OPENINGS[order.intent]).format(np=phrase, more="".join(more))
    if front:
        sentence = f"{front}, {sentence if sentence.startswith('I ') else sentence[0].lower() + sentence[1:]}"
    return sentence[0].upper() + sentence[1:]


def _noun_phrase(order: Order, plural: bool) -> str:
    count = order.get("count")
    words = [word for word in (order.get("size"), order.get("colour")) if word]
    if count or plural:
        # The new model writes the item in the singular, whatever the message says.
        item = _plural(order.get("item") or "")
        return " ".join([count or "some", *words, item])
    return " ".join(["the", *words, order.get("item") or ""])


def _plural(noun: str) -> str:
    if noun == "shelf":
        return "shelves"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")
