"""Texts as overlapping windows of sub-words that fit the model.

Shapes: T sub-words of a text that stand for characters of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from mtl_core.data.encoding import token_offsets
from mtl_core.data.examples import LONE_SURROGATE
from mtl_core.errors import TextError

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenized:
    """One text as one or more overlapping windows."""

    text: str
    windows: list[list[int]]
    """Sub-word ids of each window, special tokens included."""
    numbers: list[list[int]]
    """Which of the text's sub-words each window holds: places in `ranges`, -1 for specials."""
    ranges: Offsets
    """Characters [start, end) of each of the text's sub-words, as the tokenizer gives them."""
    long: bool = False
    """Whether the text goes beyond its first window, whether or not the others are here."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.windows))

    @cached_property
    def placed(self) -> tuple[Offsets, NDArray[np.int64], NDArray[np.int64]]:
        """Where each sub-word that stands for text is read: in the window with most context.

        Returns:
            T character ranges, in order and without overlap; (T,) windows; (T,) places in them.
        """
        offsets = token_offsets(self.text, self.ranges)
        home: list[tuple[int, int, int]] = [(-1, 0, 0)] * len(offsets)
        for window, numbers in enumerate(self.numbers):
            last = len(numbers) - 1
            for place, number in enumerate(numbers):
                context = min(place, last - place)
                if number >= 0 and context > home[number][0]:
                    home[number] = (context, window, place)
        kept = [number for number, (start, end) in enumerate(offsets) if start < end]
        homes = np.array([home[number] for number in kept], dtype=np.int64).reshape(-1, 3)
        return [offsets[number] for number in kept], homes[:, 1], homes[:, 2]


class Windows:
    """A tokenizer and the longest sequence its model reads; safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        # A copy: truncation is a setting of the tokenizer itself, which others use too.
        self.backend = Tokenizer.from_str(tokenizer.to_str())
        self.max_length = max_length
        stride = min(max_length // 4, max(max_length - 8, 0))
        self.backend.enable_truncation(max_length, stride=stride)
        self.backend.no_padding()
        self.advance = max_length - self.backend.num_special_tokens_to_add(False) - stride

    def split(
        self,
        texts: Sequence[str],
        most: int | None = None,
        states: bool = True,
        truncate: bool = True,
    ) -> list[Tokenized]:
        """Sub-words of each text, those beyond the model's reach in overlapping windows.

        Args:
            texts: any number.
            most: how many sub-words are taken; what follows the text that exceeds it is not read.
            states: keep every window; else the first alone, as where no states are wanted.
            truncate: take texts beyond the first window; else they are refused.

        Raises:
            TextError: a text is empty, blank or no valid Unicode.
            TooLong: see `truncate`.
            TooMany: see `most`.
        """
        for number, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise TextError(f"text {number + 1} is empty or only spaces")
            if LONE_SURROGATE.search(text):
                raise TextError(f"text {number + 1} is no valid Unicode: it holds half a character")
        items: list[Tokenized] = []
        tokens = 0
        encodings = encoded(self.backend, texts, most is None)
        for text, encoding in zip(texts, encodings, strict=True):
            more = encoding.overflowing
            if more and not truncate:
                raise TooLong(
                    f"input {len(items) + 1} has more than the {self.max_length} tokens that the "
                    "model reads at once"
                )
            kept = [encoding, *more] if states else [encoding]
            tokens += sum(map(len, kept))
            check_size(tokens, most)
            items.append(self._tokenized(text, kept, bool(more)))
        return items

    def _tokenized(self, text: str, encodings: Sequence[Encoding], long: bool) -> Tokenized:
        item = Tokenized(text, [], [], [], long)
        for window, encoding in enumerate(encodings):
            number = self.advance * window
            numbers = []
            for special, span in zip(encoding.special_tokens_mask, encoding.offsets, strict=True):
                if special:
                    numbers.append(-1)
                    continue
                numbers.append(number)
                if number == len(item.ranges):
                    item.ranges.append(span)
                number += 1
            item.windows.append(encoding.ids)
            item.numbers.append(numbers)
        return item

    @cached_property
    def untruncated(self) -> Tokenizer:
        """Made when first asked for: a copy of a large vocabulary takes a tenth of a second."""
        tokenizer = Tokenizer.from_str(self.backend.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def tokens(
        self, texts: Sequence[str], special: bool = True, most: int | None = None
    ) -> list[list[dict[str, Any]]]:
        """Each text's sub-words, whole, with ids and characters [start, stop).

        `text` is what they stand for, and a special token's name.

        Raises:
            TooMany: they are more than `most`.
        """
        rows, tokens = [], 0
        encodings = encoded(self.untruncated, texts, most is None, special)
        for source, encoding in zip(texts, encodings, strict=True):
            tokens += len(encoding)
            check_size(tokens, most)
            columns = (
                encoding.ids,
                encoding.tokens,
                encoding.special_tokens_mask,
                encoding.offsets,
            )
            rows.append(
                [
                    {
                        "id": number,
                        "text": token if mask else source[start:stop],
                        "special": bool(mask),
                        "start": None if mask else start,
                        "stop": None if mask else stop,
                    }
                    for number, token, mask, (start, stop) in zip(*columns, strict=True)
                ]
            )
        return rows


def encoded(
    tokenizer: Tokenizer, texts: Sequence[str], at_once: bool, special: bool = True
) -> Iterable[Encoding]:
    """Each text's encoding, made when it is asked for unless `at_once`.

    At once is faster where the tokenizer has several threads; but an encoding takes a hundred times
    its text's memory. One by one they are batches, too: for those Python's other threads go on.
    """
    if at_once:
        found: list[Encoding] = tokenizer.encode_batch(list(texts), add_special_tokens=special)
        return found
    return (tokenizer.encode_batch([text], add_special_tokens=special)[0] for text in texts)


class TooLong(ValueError):
    """A text is longer than the model reads."""


class TooMany(ValueError):
    """Texts have more sub-words than may be taken at once."""


def check_size(tokens: int, most: int | None) -> None:
    """Raise TooMany if these are more than `most`."""
    if most is not None and tokens > most:
        raise TooMany(f"the inputs have at least {tokens} tokens; at most {most} are taken")
