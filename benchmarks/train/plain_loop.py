"""Peer (b): the loop of tutorials: a batch of one task, a batch of the other, padded to 128, fp32.

Where a sentence carries both labels it goes through the encoder once for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import peers
import torch
from pace import Pace
from peers import IGNORE, TwoHeads, padded, rows_of
from torch.utils.data import DataLoader


def without_end(loader: DataLoader[Any]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def main() -> None:
    parser = peers.options(__doc__)
    parser.add_argument("--intents", type=int, required=True)
    parser.add_argument("--tags", type=int, required=True)
    options = parser.parse_args()
    model = TwoHeads(options.encoder, options.intents, options.tags, "nothing").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    rows = rows_of(options.rows)
    whole = partial(padded, pad_id=0, width=128)
    tasks = {
        "intent": [row for row in rows if row["intent"] != IGNORE],
        "labels": [row for row in rows if any(tag != IGNORE for tag in row["labels"])],
    }
    loaders = {
        name: without_end(DataLoader(found, 32, shuffle=True, collate_fn=whole))  # type: ignore[arg-type]
        for name, found in tasks.items()
    }
    pace, seen = Pace(options.steps), 0
    while True:
        for task, loader in loaders.items():
            batch = next(loader)
            loss = model(batch["input_ids"], batch["attention_mask"], **{task: batch[task]})["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tokens, seen = model.tokens - seen, model.tokens
            pace.step(tokens)


if __name__ == "__main__":
    main()
