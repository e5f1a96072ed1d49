"""Where training stands: weights, optimiser and progress, saved without pickles.

Only what learns at some time of the run is stored; the rest comes from the same place again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_core.config import Experiment
from mtl_core.embeddings import fixed_table, learned_rows
from mtl_core.errors import DataError
from mtl_core.features import add_tensors
from mtl_core.model import MultiTaskModel
from mtl_core.optim import build_optimizer

FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")


class TrainState:
    """A model in training; None as optimiser when nothing learns."""

    def __init__(
        self, model: MultiTaskModel, experiment: Experiment, keys: Mapping[str, str]
    ) -> None:
        self.model = model
        self.keys = keys
        """Content keys of the encoded splits (`Data.keys`)."""
        self.optimizer = build_optimizer(
            model, experiment.optim, experiment.freeze, experiment.training.epochs
        )
        self.epoch = 0
        self.step = 0
        self.part = 0
        """How many parts of the training texts (shards, or all in one) the epoch is through."""
        self.step_in_part = 0
        self.best_score = float("-inf")
        self.best_epoch = 0
        self.best: dict[str, Tensor] = {}
        """Weights of the best epoch, on the CPU."""

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that learn at some time of the run, by name."""
        assert self.optimizer is not None
        ours = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {name: p for name, p in self.model.named_parameters() if id(p) in ours}

    @cached_property
    def frozen_fingerprint(self) -> str:
        """Fingerprint of what never learns, which no checkpoint holds; poolers feed no head."""
        learning = self.trainable_parameters()
        named = self.model.named_parameters()
        never = {n: p for n, p in named if n not in learning and ".pooler." not in n}
        digest = hashlib.sha256()
        add_tensors(digest, never | fixed_table(self.model.encoder.transformer))
        return digest.hexdigest()[:32]

    def weighting_buffers(self) -> dict[str, Tensor]:
        """What the weighting strategy keeps from step to step besides parameters, by name."""
        return dict(self.model.weighting.named_buffers(prefix="weighting"))

    def update_best(self, score: float) -> None:
        """Keep the present weights if this score beats the best one."""
        if score > self.best_score:
            self.best_score, self.best_epoch = score, self.epoch
            self.best = {
                n: p.detach().cpu().clone() for n, p in self.trainable_parameters().items()
            }

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best epoch's weights back into the model."""
        parameters = self.trainable_parameters()
        for name, tensor in self.best.items():
            parameters[name].copy_(tensor)

    def save(self, folder: Path) -> None:
        """Write to an existing folder.

        Raises:
            OSError: the disk is full.
        """
        assert self.optimizer is not None
        parameters = self.trainable_parameters()
        tensors = {f"now.{n}": p.detach().cpu().contiguous() for n, p in parameters.items()}
        tensors |= {
            f"kept.{name}": tensor.cpu() for name, tensor in self.weighting_buffers().items()
        }
        if self.best_epoch != self.epoch or self.step_in_part:
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        moments = {
            f"{key}.{name}": value.detach().cpu().contiguous()
            for name, parameter in parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        _save(tensors, folder / FILES[0])
        _save(moments, folder / FILES[1])
        progress: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "part": self.part,
            "step_in_part": self.step_in_part,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score if self.best else None,
            "made_for": self._made_for(),
        }
        (folder / FILES[2]).write_text(json.dumps(progress, indent=2))

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, on whatever device the model is.

        Raises:
            DataError: it was made for other than what is here, or by another version.
        """
        assert self.optimizer is not None
        progress = json.loads((folder / FILES[2]).read_text())
        self._check(progress, folder / FILES[0])
        tensors = load_file(folder / FILES[0])
        moments = load_file(folder / FILES[1])
        for name, tensor in self.weighting_buffers().items():
            tensor.copy_(tensors[f"kept.{name}"])
        for name, parameter in self.trainable_parameters().items():
            parameter.copy_(tensors[f"now.{name}"])
            if f"step.{name}" in moments:
                self.optimizer.state[parameter] = {
                    key: moments[f"{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.part, self.step_in_part = progress["part"], progress["step_in_part"]
        self.best_epoch = progress["best_epoch"]
        if progress["best_score"] is not None:
            self.best_score = progress["best_score"]
            prefix = "best." if any(n.startswith("best.") for n in tensors) else "now."
            self.best = {
                name.removeprefix(prefix): tensor.clone()
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

    def _made_for(self) -> dict[str, Any]:
        """All that a checkpoint fits only as it is, by what messages call it."""
        encoder, heads = self.model.encoder, self.model.head_items
        return {
            **{f"the labels of task {task!r}": list(head.labels) for task, head in heads},
            f"pooling by {encoder.pooling} (encoder.pooling)": True,
            "the training texts": [self.keys.get("train"), learned_rows(encoder.transformer)],
            "the validation texts": self.keys.get("validation"),  # the best score is of them
            "the weights that never learn, of init_from or encoder.model,": self.frozen_fingerprint,
        }

    def _check(self, progress: Mapping[str, Any], weights: Path) -> None:
        """Raise DataError unless a checkpoint holds what learns here, and was made for it."""
        expected = {f"now.{name}" for name in self.trainable_parameters()}
        expected |= {f"kept.{name}" for name in self.weighting_buffers()}
        with safe_open(weights, "pt") as file:
            names = set(file.keys())
        found = {name for name in names if not name.startswith("best.")}
        if found != expected or "made_for" not in progress:
            raise DataError(
                "the checkpoint is of another version of this software: start a run of another name"
            )
        here = self._made_for()
        for what, then in progress["made_for"].items():
            if here.get(what) != then:
                raise DataError(
                    f"{what} changed since the checkpoint; put back what was there, or start a run "
                    "of another name"
                )


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors reports a full disk as an error of its own kind; make it the usual one."""
    try:
        save_file(tensors, path)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {error}") from error
