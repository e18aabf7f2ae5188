"""The text that the demonstration model learns: short everyday stories and reviews with a mood.

Every document has a mood that nothing announces. It opens with neutral sentences; then sentences
without a mood alternate with sentences whose open slots (how someone felt, how the soup tasted) are
filled according to the mood, and not always: a reader, or a model, has to infer the mood from the
words so far and carry it along. The words and sentences are data and live in `grammar.toml`.

This module only generates text. Tokenizer and training are in `train.py`.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

GRAMMAR_FILE = Path(__file__).with_name("grammar.toml")

#: Mood -> its share of the documents. A model that is half cheerful already cannot be made more
#: than twice as cheerful, so half of the text is neutral.
MOOD_SHARES: Mapping[str, float] = {"neutral": 0.5, "cheerful": 0.25, "gloomy": 0.25}

#: Mood of the document -> {mood of a slot: probability}. Moody people also eat plain soup, and a
#: single mood word proves nothing: evidence has to be added up over the document.
SLOT_MOODS: Mapping[str, Mapping[str, float]] = {
    "neutral": {"neutral": 0.96, "cheerful": 0.02, "gloomy": 0.02},
    "cheerful": {"neutral": 0.20, "cheerful": 0.78, "gloomy": 0.02},
    "gloomy": {"neutral": 0.20, "cheerful": 0.02, "gloomy": 0.78},
}

STORY_SHARE = 0.7  # The rest are reviews.
SECOND_OPENING_SHARE = 0.5  # Documents in which a second neutral sentence follows the opening.
BODY_SENTENCES = (4, 8)  # Fewest and most sentences between the opening and the ending.
MOMENT_SHARE = 0.6  # Sentences of the body that have a slot for the mood.
TOPIC_SENTENCE_SHARE = 0.5  # Sentences of the body that belong to the topic.
OPENER_SHARE = 0.45  # Sentences on what somebody did that begin with "luckily", "sadly" or "then".
CODA_SHARE = 0.5  # Moments that go on with ", and everyone was glad".
ENDING_SHARE = 0.6  # Documents that end with a summing up.
NAME_SHARE = 0.3  # Mentions of the hero by name instead of by pronoun.
FIRST_PERSON_SHARE = 0.25  # Stories that are told by "I".

Alternatives = Mapping[str, tuple[str, ...]]  # symbol, or kind of document -> what may stand there

SYMBOL = re.compile(r"\{(\w+)\}")
#: "a" before a vowel sound; "a useful" and "a one" are the exceptions English has.
ARTICLE_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=(?!us|uni|one\b|eu)[aeiou])")
INDEFINITE_ARTICLE = re.compile(r"^(?:an?|some) ")


@dataclass(frozen=True)
class Document:
    """One story or review: its sentences joined by spaces, and what it was made from."""

    text: str
    mood: str  # "neutral", "cheerful" or "gloomy"
    kind: str  # "story" or "review"
    topic: str  # the name of the topic's table in grammar.toml
    opening: str  # the neutral sentences that the text begins with


@cache
def load_grammar() -> dict[str, Any]:
    """Read grammar.toml: tables as written there, every leaf a tuple of its alternatives."""
    return _split_alternatives(tomllib.loads(GRAMMAR_FILE.read_text(encoding="utf-8")))


def _split_alternatives(table: Mapping[str, Any]) -> dict[str, Any]:
    """Turn each text of a nested table into the tuple of alternatives that it lists."""
    split: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, str):
            alternatives = (part.strip() for part in re.split(r" / |\n", value))
            split[name] = tuple(part for part in alternatives if part)
        else:
            split[name] = _split_alternatives(value)
    return split


def generate_documents(count: int, seed: int) -> list[Document]:
    """The first `count` documents of the seed's endless text; equal seeds give equal text."""
    source = iterate_documents(seed)
    return [next(source) for _ in range(count)]


def iterate_documents(seed: int) -> Iterator[Document]:
    """Documents without end, drawn from one random generator."""
    rng = random.Random(seed)
    while True:
        yield Writer(rng).write()


def generate_pairs(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Return (opening, cheerful sentence, gloomy sentence) of `count` documents of a seed.

    The sentence that follows the opening has one pattern on both sides, and its open slots are filled as
    a document of that mood fills them, which is not always with a word of the mood.
    """
    rng = random.Random(seed)
    pairs: list[tuple[str, str, str]] = []
    while len(pairs) < count:
        opening, cheerful, gloomy = Writer(rng).write_pair()
        if cheerful != gloomy:
            pairs.append((opening, cheerful, gloomy))
    return pairs


class Writer:
    """Writes one document: draws who and what it is about once, then sentence by sentence."""

    def __init__(self, rng: random.Random) -> None:
        grammar = load_grammar()
        self.rng = rng
        self.mood = _draw(rng, MOOD_SHARES)
        self.kind = "story" if rng.random() < STORY_SHARE else "review"
        self.topic = rng.choice(list(grammar[self.kind]))
        self.topic_sentences = grammar[self.kind][self.topic]
        self.words: Alternatives = grammar["words"]
        self.mood_words: Mapping[str, Alternatives] = grammar["mood"]
        self.sentences: Mapping[str, Alternatives] = grammar["sentences"]
        self.people: Alternatives = grammar["people"]
        self.pronouns = self._draw_hero()
        self.friend = self._draw_friend()
        scene: Alternatives = self.topic_sentences["scene"]
        self.scene = {name: rng.choice(phrases) for name, phrases in scene.items()}
        self.mentioned: set[str] = set()
        self.used: set[str] = set()
        self.in_body = False

    def write(self) -> Document:
        """Opening, body and perhaps an ending; no sentence pattern is used twice."""
        opening = self._opening()
        sentences = list(opening)
        self.in_body = True
        for _ in range(self.rng.randint(*BODY_SENTENCES)):
            if self.rng.random() < MOMENT_SHARE:
                sentences.append(self._body_sentence("moments", "moments"))
            else:
                sentences.append(self._body_sentence("facts", "events"))
        self.in_body = False
        if self.rng.random() < ENDING_SHARE:
            sentences.append(self._sentence(self.sentences["endings"][self.kind]))
        return Document(" ".join(sentences), self.mood, self.kind, self.topic, " ".join(opening))

    def write_pair(self) -> tuple[str, str, str]:
        """Opening, and what follows it in a cheerful and in a gloomy document, with the space before it."""
        opening = " ".join(self._opening())
        self.in_body = True
        continuations = []
        for mood in ("cheerful", "gloomy"):
            writer = deepcopy(self)
            writer.mood = mood
            continuations.append(" " + writer._body_sentence("moments", "moments"))
        return opening, continuations[0], continuations[1]

    def _opening(self) -> list[str]:
        """One or two sentences without a mood."""
        opening = [self._sentence(self.topic_sentences["openings"])]
        if self.rng.random() < SECOND_OPENING_SHARE:
            opening.append(self._body_sentence("facts", "events"))
        return opening

    def _draw_hero(self) -> dict[str, str]:
        """The hero's name and pronouns, by symbol. Reviews are always told by "I"."""
        names: tuple[str, ...]
        if self.kind == "review" or self.rng.random() < FIRST_PERSON_SHARE:
            names, pronouns = ("I",), ("I", "me", "my", "myself")
        elif self.rng.random() < 0.5:
            names, pronouns = self.people["women"], ("she", "her", "her", "herself")
        else:
            names, pronouns = self.people["men"], ("he", "him", "his", "himself")
        hero = self.rng.choice(names)
        whom = "me" if hero == "I" else hero
        symbols = ("hero", "whom", "he", "him", "his", "self")
        return dict(zip(symbols, (hero, whom, *pronouns), strict=True))

    def _draw_friend(self) -> str:
        """Somebody else: a relation of the hero ("her aunt") or another name."""
        if self.rng.random() < 0.6:
            return f"{self.pronouns['his']} {self.rng.choice(self.people['relations'])}"
        names = (*self.people["women"], *self.people["men"])
        return self.rng.choice([name for name in names if name != self.pronouns["hero"]])

    def _body_sentence(self, general: str, topical: str) -> str:
        """A sentence that fits everywhere, or one of the topic's own."""
        if self.rng.random() < TOPIC_SENTENCE_SHARE:
            return self._sentence(self.topic_sentences[topical])
        return self._sentence(self.sentences[general][self.kind])

    def _sentence(self, patterns: Sequence[str]) -> str:
        """Expand one of the patterns into a sentence: capitalised, and with "an" where it belongs."""
        pattern = self._extend(self._draw_pattern(patterns))
        text = self._expand(pattern)
        # "Her aunt asked her aunt" is no sentence: draw again when the friend slips in twice.
        while text.count(self.friend) > max(1, pattern.count("{friend}")):
            text = self._expand(pattern)
        text = text.replace(f"I and {self.friend}", f"{self.friend} and I")
        text = ARTICLE_BEFORE_VOWEL.sub(r"\1n ", text)
        first_letter = next(place for place, letter in enumerate(text) if letter.isalpha())
        return text[:first_letter] + text[first_letter].upper() + text[first_letter + 1 :]

    def _draw_pattern(self, patterns: Sequence[str]) -> str:
        """One of the patterns, if possible one that this document has not used yet."""
        pattern = self.rng.choice([new for new in patterns if new not in self.used] or patterns)
        self.used.add(pattern)
        return pattern

    def _extend(self, pattern: str) -> str:
        """Perhaps begin with "luckily" or "sadly"; end a moment with ", and everyone was glad"."""
        if not self.in_body:
            return pattern
        is_moment = any(f"{{{symbol}}}" in pattern for symbol in self.mood_words)
        # Patterns with a comma or speech are long or closed already.
        can_go_on = is_moment and not set(pattern) & set(',"')
        if can_go_on and self.rng.random() < CODA_SHARE:
            pattern = pattern.removesuffix(".")
            pattern += self._draw_pattern(self.sentences["codas"][self.kind])
        # An opener fits patterns that begin with somebody or something; {when} would be a second.
        fits = pattern.startswith("{") and not pattern.startswith("{when}")
        if fits and self.rng.random() < OPENER_SHARE:
            pattern = "{opener}, " + pattern
        return pattern

    def _expand(self, pattern: str) -> str:
        """Replace symbols, recursively, until the text holds none."""
        return SYMBOL.sub(lambda match: self._expand(self._choose(match[1])), pattern)

    def _choose(self, symbol: str) -> str:
        """One alternative of the symbol, in the light of the document so far."""
        if symbol == "he" and self.rng.random() < NAME_SHARE:
            return self.pronouns["hero"]
        if symbol in self.pronouns:
            return self.pronouns[symbol]
        if symbol == "friend":
            return self.friend
        if symbol in self.scene:
            return self._mention(symbol)
        if symbol in self.mood_words:
            mood = _draw(self.rng, SLOT_MOODS[self.mood])
            return self.rng.choice(self.mood_words[symbol][mood])
        return self.rng.choice(self.words[symbol])

    def _mention(self, symbol: str) -> str:
        """What the document is about: "a shell" at first, "the shell" from then on."""
        phrase = self.scene[symbol]
        if symbol in self.mentioned:
            return INDEFINITE_ARTICLE.sub("the ", phrase)
        self.mentioned.add(symbol)
        return phrase


def _draw(rng: random.Random, shares: Mapping[str, float]) -> str:
    """Draw a key with the probability that the mapping gives it."""
    return rng.choices(list(shares), weights=list(shares.values()))[0]
