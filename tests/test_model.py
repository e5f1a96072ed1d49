"""One encoder, any set of heads: who reads what from a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_core.build import build_model
from mtl_core.config import EncoderConfig, TaskConfig, parse_experiment
from mtl_core.encoder import SentenceEncoder
from mtl_core.heads import build_head
from mtl_core.model import Batch, Labelled, MultiTaskModel

LABELS = ("a", "b")


@pytest.mark.parametrize("task", ["type", "values", "training", "v1.2", "forward", "label"])
def test_a_task_may_have_any_name_the_experiment_allows(
    tiny_encoders: dict[str, Path], task: str
) -> None:
    raw = {
        "name": "x",
        "tasks": {task: {"kind": "classification"}},
        "data": [{"path": "x.jsonl", "columns": {"text": "text", task: "label"}}],
        "encoder": {"model": str(tiny_encoders["bert"])},
        "weighting": {"strategy": "uncertainty"},
    }
    model = build_model(parse_experiment(raw), {task: LABELS})
    ids = torch.tensor([[2, 7, 3]])
    labelled = {task: Labelled(torch.tensor([0]), torch.tensor([1]))}
    losses = model(Batch(ids, torch.ones_like(ids), labelled))
    model.weighting.backward(losses, {task: 1.0})
    assert list(model.heads) == [task]
    assert all(p.grad is not None for p in model.head(task).parameters())
    names = {name for name, _ in model.head(task).named_parameters()}
    assert {f"heads.{task}.{name}" for name in names} <= set(model.state_dict())


def test_fresh_heads_follow_the_seed(tiny_encoders: dict[str, Path]) -> None:
    raw = {
        "name": "x",
        "tasks": {"sentiment": {"kind": "classification"}},
        "data": [{"demo": True, "columns": {"text": "text", "sentiment": "sentiment"}}],
        "encoder": {"model": str(tiny_encoders["bert"])},
    }

    def weights(seed: int) -> torch.Tensor:
        experiment = parse_experiment(raw | {"seed": seed})
        return build_model(experiment, {"sentiment": LABELS}).head("sentiment").output.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.fixture
def model(tiny_encoders: dict[str, Path]) -> MultiTaskModel:
    encoder = SentenceEncoder.load(EncoderConfig(model=str(tiny_encoders["bert"])))
    heads = {
        "intent": build_head(32, LABELS, TaskConfig(kind="classification")),
        "ner": build_head(32, ("loc",), TaskConfig(kind="token_classification")),
    }
    return MultiTaskModel(encoder, heads).eval()


def batch_of(labelled: dict[str, Labelled]) -> Batch:
    ids = torch.tensor([[2, 9, 11, 3], [2, 8, 3, 0]])
    return Batch(ids, (ids != 0).long(), labelled)


def test_a_batch_without_labels_gives_zero_losses_and_zero_gradients(model: MultiTaskModel) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    losses = model(batch_of({"intent": Labelled(none, none), "ner": Labelled(none, none)}))
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        if ".pooler." in name:
            continue
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_losses_of_rows_add_up_to_the_loss_of_the_batch(model: MultiTaskModel) -> None:
    def losses(rows: list[int]) -> dict[str, float]:
        tokens = [t for t in (1, 2, 5) if t // 4 in rows]
        labelled = {
            "intent": Labelled(torch.tensor(rows), torch.tensor(rows)),
            "ner": Labelled(torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.int64)),
        }
        return {task: float(loss.detach()) for task, loss in model(batch_of(labelled)).items()}

    both, first, second = losses([0, 1]), losses([0]), losses([1])
    assert both == pytest.approx({task: first[task] + second[task] for task in both})
    assert min(both.values()) > 0


def test_moving_a_batch_to_where_it_is_copies_nothing(model: MultiTaskModel) -> None:
    batch = batch_of({})
    assert batch.to(torch.device("cpu")) is batch
