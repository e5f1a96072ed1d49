"""What waits becomes the next batch, within bounds; whoever leaves or fails leaves alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mtl_core.predictor import chunks
from serve_app.batcher import Batch, Batcher, Job, Overloaded


class Encoder:
    """Notes the batches it is given; stands still while `gate` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[Job]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_on: str | None = None

    def __call__(self, jobs: list[Job]) -> Any:
        assert self.gate.wait(10)
        self.batches.append(jobs)
        if any(item.text == self.fail_on for job in jobs for item in job.items):
            raise ValueError("this batch cannot be encoded")
        return [item.text.upper() for job in jobs for item in job.items]

    @property
    def texts(self) -> list[list[str]]:
        return [[item.text for job in jobs for item in job.items] for jobs in self.batches]


def settle(batch: Batch) -> None:
    """Give each job its own rows."""
    first = 0
    for job in batch.jobs:
        rows = batch.features[first : first + len(job.items)]  # type: ignore[index]
        first += len(job.items)
        if not job.future.done():
            job.future.set_result(rows)


def item(text: str, tokens: int = 1) -> Any:
    return SimpleNamespace(text=text, num_tokens=tokens)


def run(
    scenario: Callable[[Batcher, Encoder], Any],
    max_waiting: int = 100,
    batch_tokens: int = 100,
    max_waiting_tokens: int = 1000,
) -> None:
    async def main() -> None:
        encoder = Encoder()
        batcher = Batcher(encoder, settle, max_waiting, batch_tokens, max_waiting_tokens)
        await scenario(batcher, encoder)
        assert batcher.unanswered == batcher.unanswered_tokens == 0

    asyncio.run(main())


def ask(batcher: Batcher, *texts: str, tokens: int = 1, model: Any = "v1") -> asyncio.Task[Any]:
    items = [item(text, tokens) for text in texts]
    return asyncio.create_task(batcher.submit(items, (), False, False, model))


async def busy(batcher: Batcher, encoder: Encoder) -> asyncio.Task[Any]:
    """Occupy the encoder with one text."""
    encoder.gate.clear()
    first = ask(batcher, "first")
    await asyncio.sleep(0.01)
    return first


def test_an_idle_encoder_takes_a_request_at_once() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        assert await ask(batcher, "one", "two") == [["ONE", "TWO"]]
        assert encoder.texts == [["one", "two"]]

    run(scenario)


def test_what_waits_while_the_encoder_is_busy_is_its_next_batch() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        tasks = [await busy(batcher, encoder), *(ask(batcher, name) for name in "abc")]
        await asyncio.sleep(0.01)
        encoder.gate.set()
        assert await asyncio.gather(*tasks) == [[["FIRST"]], [["A"]], [["B"]], [["C"]]]
        assert encoder.texts == [["first"], ["a", "b", "c"]]

    run(scenario)


def test_a_batch_is_bounded_by_tokens_and_keeps_the_order() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        tasks = [await busy(batcher, encoder)]
        tasks += [ask(batcher, name, tokens=4) for name in "abcde"]
        await asyncio.sleep(0.01)
        encoder.gate.set()
        await asyncio.gather(*tasks)
        assert encoder.texts == [["first"], ["a", "b"], ["c", "d"], ["e"]]

    run(scenario, batch_tokens=10)


def test_a_long_request_is_cut_into_batches_and_its_answers_come_in_order() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        reply = await ask(batcher, *"abcde", tokens=4)
        assert reply == [["A", "B"], ["C", "D"], ["E"]]
        assert encoder.texts == [["a", "b"], ["c", "d"], ["e"]]

    run(scenario, batch_tokens=10)


def test_a_text_larger_than_a_batch_goes_alone() -> None:
    sizes = [3, 50, 3, 3]
    found = list(chunks([item(str(n), size) for n, size in enumerate(sizes)], 10))
    assert [([i.text for i in items], tokens) for items, tokens in found] == [
        (["0"], 3),
        (["1"], 50),
        (["2", "3"], 6),
    ]


def test_texts_count_as_waiting_while_they_are_tokenised() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        with batcher.held(9):
            with pytest.raises(Overloaded):
                await ask(batcher, "a", "b")
            assert await ask(batcher, "a") == [["A"]]
        assert await ask(batcher, "a", "b") == [["A", "B"]]

    run(scenario, max_waiting=10)


def test_a_request_that_is_cancelled_while_it_waits_is_not_encoded() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        first = await busy(batcher, encoder)
        gone, stays = ask(batcher, "gone"), ask(batcher, "stays")
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        assert batcher.unanswered == 2
        encoder.gate.set()
        await asyncio.gather(first, stays)
        assert encoder.texts == [["first"], ["stays"]]

    run(scenario)


def test_a_request_that_is_cancelled_in_the_encoder_harms_nobody() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        first = await busy(batcher, encoder)
        first.cancel()
        stays = ask(batcher, "stays")
        await asyncio.sleep(0.01)
        encoder.gate.set()
        assert await stays == [["STAYS"]]

    run(scenario)


@pytest.mark.parametrize("texts", [["one more"], ["a", "list", "of", "four"]])
def test_a_full_queue_refuses_single_texts_and_lists_alike(texts: list[str]) -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        first, rest = await busy(batcher, encoder), ask(batcher, "b", "c")
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="3 texts are waiting, of at most 3"):
            await ask(batcher, *texts)
        with pytest.raises(Overloaded), batcher.held(len(texts)):
            pytest.fail("they would be tokenised only to be refused")
        encoder.gate.set()
        await asyncio.gather(first, rest)
        assert await ask(batcher, *texts) == [[text.upper() for text in texts]]

    run(scenario, max_waiting=3)


@pytest.mark.parametrize(("texts", "tokens"), [(["a"], 99), (["a", "b"], 50)])
def test_few_long_texts_fill_the_queue_as_many_short_ones_do(texts: list[str], tokens: int) -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        first, rest = await busy(batcher, encoder), ask(batcher, *texts, tokens=tokens)
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match=f"{1 + waiting} tokens are waiting, of 100"):
            await ask(batcher, "c")
        encoder.gate.set()
        await asyncio.gather(first, rest)
        assert await ask(batcher, "c") == [["C"]]

    waiting = len(texts) * tokens
    run(scenario, max_waiting_tokens=100)


def test_a_long_request_is_taken_while_little_waits() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        first, long = await busy(batcher, encoder), ask(batcher, "long", tokens=400)
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="401 tokens are waiting"):
            await ask(batcher, "another", tokens=400)
        encoder.gate.set()
        assert await asyncio.gather(first, long) == [[["FIRST"]], [["LONG"]]]

    run(scenario, max_waiting_tokens=100)


def test_an_idle_encoder_takes_a_request_larger_than_the_queue() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        assert await ask(batcher, *"abcdef") == [["A", "B", "C", "D", "E", "F"]]

    run(scenario, max_waiting=3)


def test_two_versions_of_a_model_never_share_a_batch() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        old, new = object(), object()
        tasks = [await busy(batcher, encoder)]
        tasks += [ask(batcher, f"{n}", model=model) for n, model in enumerate([old, old, new, old])]
        await asyncio.sleep(0.01)
        encoder.gate.set()
        await asyncio.gather(*tasks)
        assert encoder.texts == [["first"], ["0", "1"], ["2"], ["3"]]
        assert all(len({id(job.model) for job in jobs}) == 1 for jobs in encoder.batches)

    run(scenario)


def test_an_error_of_the_encoder_fails_its_batch_and_no_other() -> None:
    async def scenario(batcher: Batcher, encoder: Encoder) -> None:
        encoder.fail_on = "bad"
        tasks = [await busy(batcher, encoder)]
        tasks += [ask(batcher, name, tokens=4) for name in ("bad", "same batch", "next batch")]
        await asyncio.sleep(0.01)
        encoder.gate.set()
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        assert replies[0] == [["FIRST"]]
        assert [type(reply) for reply in replies[1:3]] == [ValueError, ValueError]
        assert replies[3] == [["NEXT BATCH"]]

    run(scenario, batch_tokens=10)


def test_an_error_in_what_follows_a_batch_fails_its_requests_instead_of_hanging_them() -> None:
    async def main() -> None:
        def broken(batch: Batch) -> None:
            raise RuntimeError("settling failed")

        batcher = Batcher(Encoder(), broken, 100, 100, 1000)
        with pytest.raises(RuntimeError, match="settling failed"):
            await asyncio.wait_for(ask(batcher, "one"), 2)
        batcher.done = settle
        assert await asyncio.wait_for(ask(batcher, "two"), 2) == [["TWO"]]

    asyncio.run(main())
