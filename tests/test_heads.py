"""What heads learn from and how they decode, against brute force, torch and scikit-learn."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from mtl_core.config import TaskConfig
from mtl_core.data.tags import tag_names
from mtl_core.heads import HEADS, Head, build_head, legalise, viterbi

LABELS = ("a", "b", "c")
KINDS: tuple[Any, ...] = ("classification", "multilabel", "token_classification")


def head_of(kind: Any, labels: tuple[str, ...] = LABELS, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_head(8, labels, TaskConfig(kind=kind, **settings))


def is_legal(tags: Any, num_types: int) -> bool:
    names = tag_names([str(i) for i in range(num_types)])
    previous = "O"
    for tag in (names[t] for t in tags):
        if tag.startswith("I-") and previous[2:] != tag[2:]:
            return False
        previous = tag
    return True


@st.composite
def token_logits(draw: st.DrawFn, longest: int = 4) -> Any:
    """(L, T) logits; small whole numbers, so that ties occur."""
    length = draw(st.integers(0, longest))
    num_tags = 1 + 2 * draw(st.integers(1, 2))
    values = draw(
        st.lists(st.integers(-4, 4), min_size=length * num_tags, max_size=length * num_tags)
    )
    return np.array(values, dtype=np.float32).reshape(length, num_tags)


@settings(max_examples=60, deadline=None)
@given(token_logits())
def test_viterbi_finds_the_best_of_all_legal_sequences(logits: Any) -> None:
    length, num_tags = logits.shape
    num_types = (num_tags - 1) // 2
    best = max(
        sum(logits[i, tag] for i, tag in enumerate(tags))
        for tags in product(range(num_tags), repeat=length)
        if is_legal(tags, num_types)
    )
    found = viterbi(logits)
    assert found.shape == (length,)
    assert is_legal(found, num_types)
    assert logits[np.arange(length), found].sum() == pytest.approx(best)


@pytest.mark.parametrize("decoding", ["viterbi", "greedy"])
def test_decoding_is_legal_whatever_the_logits(decoding: Any) -> None:
    head = head_of("token_classification", decoding=decoding)
    random = np.random.default_rng(0)
    for length in (0, 1, 2, 7, 60):
        logits = random.normal(size=(length, head.num_outputs), scale=5).astype(np.float32)
        logits[:, 4:] += 3  # mostly I-
        tags = head.decode(logits)
        assert tags.shape == (length,)
        assert is_legal(tags, len(LABELS))


def test_greedy_keeps_each_tokens_best_tag_and_mends_only_what_is_illegal() -> None:
    names = tag_names(("x", "y"))
    ids = {name: i for i, name in enumerate(names)}

    def mended(*tags: str) -> list[str]:
        return [names[i] for i in legalise(np.array([ids[t] for t in tags]), 2)]

    assert mended("I-x", "I-x", "O", "I-y") == ["B-x", "I-x", "O", "B-y"]
    assert mended("B-x", "I-y", "I-y", "I-x") == ["B-x", "B-y", "I-y", "B-x"]
    assert mended("B-x", "B-x", "I-x") == ["B-x", "B-x", "I-x"]
    head = head_of("token_classification", ("x", "y"), decoding="greedy")
    logits = np.eye(5, dtype=np.float32)[[ids["I-x"], ids["I-x"], ids["O"]]]
    assert [names[i] for i in head.decode(logits)] == ["B-x", "I-x", "O"]


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_balanced_class_weights_are_those_of_scikit_learn(kind: Any) -> None:
    head = head_of(kind, class_weights="balanced")
    counts = np.arange(1, head.num_outputs + 1) ** 2
    counts[1] = 0  # a label that no training row has
    targets = np.repeat(np.arange(head.num_outputs), counts)
    head.set_label_counts(counts)
    expected = compute_class_weight("balanced", classes=np.unique(targets), y=targets)
    found = head.label_weights.numpy()
    np.testing.assert_allclose(found[counts > 0], expected, rtol=1e-6)
    assert found[1] == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_train_never_has_counts_no_more_than_without_class_weights(
    kind: Any, smoothing: float
) -> None:
    """As often as each other, those that occur have a factor of 1."""
    losses = []
    for class_weights in (None, "balanced"):
        head = head_of(kind, label_smoothing=smoothing, class_weights=class_weights)
        counts = np.full(head.num_outputs, 50)
        counts[0] = 0
        head.set_label_counts(counts)
        logits = torch.linspace(-2, 2, head.num_outputs).expand(4, -1)
        targets = torch.arange(1, 3).repeat(2)
        if kind == "multilabel":
            targets = F.one_hot(targets, head.num_outputs)
        losses.append(head.loss_sum(logits, targets))
    torch.testing.assert_close(*losses)


def test_a_class_weight_by_name_counts_for_begin_and_inside_tags() -> None:
    head = head_of("token_classification", class_weights={"b": 3.0})
    head.set_label_counts(np.ones(7, dtype=np.int64))
    assert head.label_weights.tolist() == [1, 1, 3, 1, 1, 3, 1]
    head = head_of("token_classification", class_weights={"b": 3.0, "I-b": 2.0, "O": 0.5})
    head.set_label_counts(np.ones(7, dtype=np.int64))
    assert head.label_weights.tolist() == [0.5, 1, 3, 1, 1, 2, 1]


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_a_label_of_a_text_may_begin_as_a_tag_does(kind: Any) -> None:
    head = head_of(kind, ("B-cell", "cell"), class_weights={"B-cell": 3.0})
    head.set_label_counts(np.ones(2, dtype=np.int64))
    assert head.label_weights.tolist() == [3, 1]


def targets_for(head: Head, num_items: int) -> torch.Tensor:
    if head.kind == "multilabel":
        return torch.randint(0, 2, (num_items, len(LABELS)))
    return torch.randint(0, head.num_outputs, (num_items,))


@pytest.mark.parametrize("class_weights", [None, "balanced"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_without_items_the_loss_and_every_gradient_are_zero(
    kind: Any, smoothing: float, class_weights: Any
) -> None:
    head = head_of(kind, label_smoothing=smoothing, class_weights=class_weights, hidden_size=5)
    head.set_label_counts(np.arange(1, head.num_outputs + 1))
    loss = head.loss_sum(head(torch.zeros(0, 8)), targets_for(head, 0))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == 0
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_the_loss_is_the_sum_of_smoothed_weighted_cross_entropies(
    kind: Any, smoothing: float
) -> None:
    head = head_of(kind, label_smoothing=smoothing, class_weights={"b": 2.0})
    head.set_label_counts(np.ones(head.num_outputs, dtype=np.int64))
    logits = torch.randn(11, head.num_outputs)
    targets = targets_for(head, 11)
    wanted = F.one_hot(targets, head.num_outputs) * (1 - smoothing) + smoothing / head.num_outputs
    by_hand = -(wanted * head.label_weights * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(head.loss_sum(logits, targets), by_hand)
    parts = head.loss_sum(logits[:4], targets[:4]) + head.loss_sum(logits[4:], targets[4:])
    torch.testing.assert_close(parts, by_hand)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_multilabel_loss_averages_binary_cross_entropy_over_labels(smoothing: float) -> None:
    head = head_of("multilabel", label_smoothing=smoothing, class_weights={"c": 4.0})
    head.set_label_counts(np.ones(3, dtype=np.int64))
    logits, targets = torch.randn(9, 3), targets_for(head, 9)
    probability = logits.sigmoid()
    wanted = targets.float() * (1 - smoothing) + smoothing / 2
    losses = -(wanted * probability.log() + (1 - wanted) * (1 - probability).log())
    by_hand = (losses * torch.tensor([1.0, 1.0, 4.0])).mean(dim=1).sum()
    torch.testing.assert_close(head.loss_sum(logits, targets), by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_probabilities_that_torch_gives(kind: Any) -> None:
    head = head_of(kind)
    logits = torch.randn(6, head.num_outputs) * 20
    expected = logits.sigmoid() if kind == "multilabel" else logits.softmax(-1)
    np.testing.assert_allclose(head.scores(logits.numpy()), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_probabilities_without_a_warning(kind: Any) -> None:
    head = head_of(kind)
    logits = np.full((1, head.num_outputs), -1000, dtype=np.float32)
    logits[0, 0] = 1000
    np.testing.assert_allclose(head.scores(logits)[0], [1] + [0] * (head.num_outputs - 1))


def test_half_precision_features_give_full_precision_logits() -> None:
    head = head_of("classification").to(torch.bfloat16)
    assert head(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_weights_fit_only_a_head_of_the_same_kind_and_shape(kind: Any) -> None:
    head = head_of(kind)
    assert head.fits(head_of(kind))
    assert not head.fits(head_of(kind, ("a", "b")))
    assert not head.fits(head_of(kind, hidden_size=4))
    others = [head_of(other) for other in HEADS if other != kind]
    assert not any(head.fits(other) for other in others)
