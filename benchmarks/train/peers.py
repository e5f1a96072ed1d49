"""The model that users of other tools write, and the rows that all contenders train on."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

IGNORE = -100


def options(description: str | None) -> argparse.ArgumentParser:
    """What every peer is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps a slice")
    return parser


def training_settings(bf16: bool, epochs: int = 1000) -> dict[str, Any]:
    """Arguments of both trainers: batches of 32, on the CPU, nothing written."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": 32,
        "num_train_epochs": epochs,
        "use_cpu": True,
        "bf16": bf16,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def rows_of(path: str) -> list[dict[str, Any]]:
    """Texts as a tokenizer gives them, with the class in `intent` and a tag a token in `labels`.

    A row without one of the two has IGNORE in its place.
    """
    found = np.load(path)
    starts = found["starts"]
    rows = []
    for index in range(len(starts) - 1):
        place = slice(starts[index], starts[index + 1])
        ids = found["input_ids"][place].tolist()
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": found["tags"][place].tolist(),
                "intent": int(found["intent"][index]),
            }
        )
    return rows


def padded(rows: list[dict[str, Any]], pad_id: int, width: int) -> dict[str, torch.Tensor]:
    """Rows as a batch of one width."""
    filler = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in filler.items()
    }
    return {**batch, "intent": torch.tensor([row["intent"] for row in rows])}


class TwoHeads(nn.Module):
    """An encoder with a linear layer on the mean of its states and one on each state."""

    def __init__(self, encoder: str, num_intents: int, num_tags: int, frozen: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(encoder, dtype=torch.float32)
        self.encoder.pooler = None  # neither head reads it
        width = self.encoder.config.hidden_size
        self.dropout = nn.Dropout(0.1)
        self.intent_head = nn.Linear(width, num_intents)
        self.tag_head = nn.Linear(width, num_tags)
        self.loss = nn.CrossEntropyLoss(ignore_index=IGNORE)
        self.tokens = 0
        """Real tokens seen, padding left out."""
        if frozen == "encoder":
            self.encoder.requires_grad_(False)
        elif frozen != "nothing":
            self.encoder.embeddings.requires_grad_(False)
            for layer in self.encoder.encoder.layer[: int(frozen)]:
                layer.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        intent: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        self.tokens += int(attention_mask.sum())
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        total = states.new_zeros(())
        # Cross entropy over nothing is not a number: a batch may lack one of the tasks.
        if intent is not None and (intent != IGNORE).any():
            logits = self.intent_head(self.dropout(pooled))
            total = total + self.loss(logits.float(), intent)
        if labels is not None and (labels != IGNORE).any():
            logits = self.tag_head(self.dropout(states))
            total = total + self.loss(logits.flatten(0, 1).float(), labels.flatten())
        return {"loss": total}

    @torch.no_grad()
    def predict(self, rows: list[dict[str, Any]], pad_id: int) -> dict[str, np.ndarray]:
        """(N,) the best class of each row and (all tokens,) the best tag of each token."""
        self.eval()
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        intents, tags = {}, {}
        for first in range(0, len(order), 64):
            places = order[first : first + 64]
            width = max(len(rows[place]["input_ids"]) for place in places)
            batch = padded([rows[place] for place in places], pad_id, width)
            mask = batch["attention_mask"]
            states = self.encoder(input_ids=batch["input_ids"], attention_mask=mask)[0]
            pooled = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            best = self.intent_head(pooled).argmax(-1).tolist()
            each = self.tag_head(states).argmax(-1)
            for place, intent, line in zip(places, best, each, strict=True):
                intents[place] = intent
                tags[place] = line[: len(rows[place]["input_ids"])].numpy()
        self.train()
        return {
            "intent": np.array([intents[index] for index in range(len(rows))]),
            "tags": np.concatenate([tags[index] for index in range(len(rows))]),
        }
