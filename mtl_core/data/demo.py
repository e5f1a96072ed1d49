"""The embedded demo corpus: two tasks, `sentiment` and `entities`, generated from a seed.

Rows resemble separate data sets put together: two in five carry only a sentiment, two in five only
entities, one in five both. Negation, contrast and denial turn opinion words around, and names are
ambiguous, so neither a word list nor a list of names solves it. In the test split most names and
about two in five opinion phrases occur nowhere in train or validation.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import TypeAlias

from mtl_core.data import demo_frames as frames
from mtl_core.data import demo_opinions as opinions
from mtl_core.data.examples import Example, Span, Target

SENTIMENTS = ("negative", "neutral", "positive")
ENTITY_TYPES = ("organisation", "person", "place", "product")

_SPLITS = {"train": (1600, 0.0), "validation": (200, 0.0), "test": (400, 0.65)}
"""Rows, and how often a choice is made from the held-out share."""

_CARRIED = (("sentiment",), ("entities",), ("sentiment",), ("entities",), ("sentiment", "entities"))

_OPPOSITE = {"positive": "negative", "negative": "positive"}
_NAME_SLOT = re.compile(r"\[(?:([^\]|]+)\|)?(\w+)\]")

_Piece: TypeAlias = tuple[str, str | None]
"""A stretch of text and its entity type, or None between entities."""


def demo_corpus(seed: int = 42) -> dict[str, list[Example]]:
    """The splits train (1600 rows), validation (200) and test (400).

    One seed gives one corpus, in any process. No text occurs twice, letter case aside.
    """
    taken: set[str] = set()
    return {
        split: _rows(_Writer(random.Random(f"{seed} {split}"), held_out), num_rows, taken)
        for split, (num_rows, held_out) in _SPLITS.items()
    }


def _rows(writer: _Writer, num_rows: int, taken: set[str]) -> list[Example]:
    """Rows with texts that are not in `taken`, which grows by them."""
    rows: list[Example] = []
    while len(rows) < num_rows:
        # Five kinds of rows times three sentiments, in turn, keep every split balanced.
        tasks = _CARRIED[len(rows) % len(_CARRIED)]
        sentiment = SENTIMENTS[len(rows) // len(_CARRIED) % len(SENTIMENTS)]
        example = writer.example(tasks, sentiment)
        if example.text.casefold() not in taken:
            taken.add(example.text.casefold())
            rows.append(example)
    writer.rng.shuffle(rows)
    return rows


class _Writer:
    """The grammar. Methods return sentences whose names are still slots; `example` fills them."""

    def __init__(self, rng: random.Random, held_out: float) -> None:
        self.rng = rng
        self.held_out = held_out

    def example(self, tasks: tuple[str, ...], sentiment: str) -> Example:
        """One row of that sentiment, labelled for `tasks`."""
        wants_names = "entities" in tasks
        if "sentiment" not in tasks and self.rng.random() < 0.5:
            sentiment = "neutral"  # corpora of entities are mostly news
        if sentiment == "neutral" and self.rng.random() < 0.6:
            sentences = self.facts()
        else:
            sentences = self.review(sentiment, named=0.9 if wants_names else 0.3)
        text, spans = _join(self.render(sentences, sentiment))
        labels: dict[str, Target] = {"sentiment": sentiment, "entities": spans}
        targets = {task: labels[task] for task in tasks}
        return Example(text, targets, _words(text, spans) if wants_names else ())

    def pick(self, pool: frames.Pool) -> str:
        use_held_out = bool(pool.held_out) and self.rng.random() < self.held_out
        return self.rng.choice(pool.held_out if use_held_out else pool.seen)

    def facts(self) -> list[str]:
        """One or two plain sentences, most of them with names."""
        pools = [frames.NEWS if self.rng.random() < 0.85 else frames.NAMELESS]
        if self.rng.random() < 0.3:
            pools.append(frames.NAMELESS)
        self.rng.shuffle(pools)
        return [self.pick(pool) for pool in pools]

    def review(self, sentiment: str, named: float) -> list[str]:
        """An opinion, or a remark for neutral, often after a sentence that sets the scene."""
        domain = self.rng.choice(opinions.DOMAINS)
        thing = self.rng.choice(domain.named if self.rng.random() < named else domain.things)
        if sentiment == "neutral":
            sentences = [self.remark(domain, thing)]
        else:
            sentences = [self.opinion(domain, sentiment, thing)]
        if self.rng.random() < 0.3:
            sentences.insert(0, self.pick(domain.openers))
        if self.rng.random() < 0.15:
            sentences.insert(0, self.pick(opinions.CLAUSES["neutral"]))
        return sentences

    def remark(self, domain: opinions.Domain, thing: str) -> str:
        """Neutral: a fact about the thing, or a question that leaves the opinion open."""
        if self.rng.random() < 0.5:
            return f"{thing} was {self.pick(domain.predicates['neutral'])}"
        words = [self.pick(pool) for pool in domain.adjectives.values()]
        self.rng.shuffle(words)
        return self.pick(frames.QUESTIONS).format(thing=thing, x=words[0], y=words[1])

    def opinion(self, domain: opinions.Domain, sentiment: str, thing: str) -> str:
        """A sentence that ends up positive or negative."""
        opposite = _OPPOSITE[sentiment]
        form = self.rng.choices(
            ("plain", "contrast", "reversal", "clause", "highlights"), (38, 28, 12, 14, 8)
        )[0]
        if form == "reversal":
            word = self.pick(domain.adjectives[opposite])
            return self.pick(frames.REVERSALS).format(thing=thing, x=word)
        if form == "highlights":
            first, last = (self.pick(opinions.HIGHLIGHTS[one]) for one in (opposite, sentiment))
            return self.pick(frames.HIGHLIGHT_FRAMES).format(a=first, b=last)
        last = f"{thing} was {self.verdict(domain, sentiment)}"
        if form == "contrast":
            other = self.rng.choice([one for one in domain.things if one != thing])
            first = f"{other} was {self.verdict(domain, opposite)}"
            return self.pick(frames.CONTRASTS).format(a=first, b=last)
        if form == "clause":
            last = f"{last} and {self.pick(opinions.CLAUSES[sentiment])}"
        if self.rng.random() < 0.3:
            last = f"{self.pick(frames.PREFIXES)} {last}"
        return last

    def verdict(self, domain: opinions.Domain, sentiment: str) -> str:
        """What stands after "was": an adjective, a denied adjective of the opposite, a phrase."""
        form = self.rng.choices(("adjective", "negation", "domain", "general"), (25, 30, 27, 18))[0]
        if form == "adjective":
            degree = self.rng.choice(("", "really ", "truly "))
            return f"{degree}{self.pick(domain.adjectives[sentiment])}"
        if form == "negation":
            word = self.pick(domain.adjectives[_OPPOSITE[sentiment]])
            return self.pick(frames.NEGATIONS).format(x=word)
        pools = domain.predicates if form == "domain" else opinions.PREDICATES
        return self.pick(pools[sentiment])

    def render(self, sentences: list[str], sentiment: str) -> list[_Piece]:
        """Fill the name slots, capitalise and punctuate; one text in eight is all lower case."""
        pieces: list[_Piece] = []
        used: set[str] = set()
        for number, sentence in enumerate(sentences):
            is_last = number == len(sentences) - 1
            end = "" if sentence.endswith("?") else self.ending(sentiment) if is_last else "."
            filled = [piece for piece in self.fill(sentence, used) if piece[0]]
            start, label = filled[0]
            filled[0] = (start[0].upper() + start[1:], label)
            pieces += [*filled, (end if is_last else f"{end} ", None)]
        if self.rng.random() < 0.12:
            return [(text.lower(), label) for text, label in pieces]
        return pieces

    def ending(self, sentiment: str) -> str:
        if sentiment != "neutral" and self.rng.random() < 0.15:
            return "!"
        return self.rng.choices((".", "", "..."), (84, 12, 4))[0]

    def fill(self, sentence: str, used: set[str]) -> list[_Piece]:
        """Cut a sentence at its name slots and draw the names, none twice."""
        pieces: list[_Piece] = []
        position = 0
        for slot in _NAME_SLOT.finditer(sentence):
            literal, kind = slot.groups()
            name = literal or self.name(kind, used)
            used.add(name)
            label = "person" if kind == "surname" else kind
            pieces += [(sentence[position : slot.start()], None), (name, label)]
            position = slot.end()
        return [*pieces, (sentence[position:], None)]

    def name(self, kind: str, used: set[str]) -> str:
        """A name that is not in `used`; a person goes by full name or by first name."""
        name = ""
        while not name or name in used:
            if kind == "surname":
                name = self.pick(frames.LAST_NAMES)
            elif kind != "person":
                name = self.pick(frames.NAMES[kind])
            elif self.rng.random() < 0.35:
                name = self.pick(frames.FIRST_NAMES)
            else:
                name = self.full_name()
        return name

    def full_name(self) -> str:
        """First and last name of one share, so that a held-out person is wholly unseen."""
        use_held_out = self.rng.random() < self.held_out
        first, last = (
            self.rng.choice(pool.held_out if use_held_out else pool.seen)
            for pool in (frames.FIRST_NAMES, frames.LAST_NAMES)
        )
        return f"{first} {last}"


def _join(pieces: list[_Piece]) -> tuple[str, tuple[Span, ...]]:
    """The text of the pieces, and a span for each that is an entity."""
    text = ""
    spans: list[Span] = []
    for piece, label in pieces:
        if label is not None:
            spans.append(Span(len(text), len(text) + len(piece), label))
        text += piece
    return text, tuple(spans)


def _words(text: str, spans: tuple[Span, ...]) -> tuple[tuple[int, int], ...]:
    """Runs of non-space characters, cut at the edges of spans: "Paris." is "Paris" and "."."""
    edges = {edge for span in spans for edge in (span.start, span.end)}
    words: list[tuple[int, int]] = []
    for run in re.finditer(r"\S+", text):
        inside = sorted(edge for edge in edges if run.start() < edge < run.end())
        words += pairwise((run.start(), *inside, run.end()))
    return tuple(words)
