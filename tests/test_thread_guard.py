"""10,000 calls of many threads on one model: each is served whole or refused, and the served ones learn the same."""

import threading

import numpy as np
import pytest
from test_determinism import batch, build, contents

CALLS, THREADS = 10_000, 8


def test_ten_thousand_calls_at_once(backend):
    """Bits are compared with those of one thread that makes the served calls, in the order of their service."""
    m = build(backend, streams=2, max_tokens=2)
    batches = [batch(number, 2, 2) for number in range(16)]
    evaluate = lambda which: m.evaluate(*batches[which][:2])
    looks = (lambda which: m.state(), lambda which: m.brain.broca_output(), evaluate)
    orders = []  # (optimizer step after it, which batch) of the served training calls
    refused, others, errors = [0] * THREADS, [0] * THREADS, []
    start = threading.Barrier(THREADS)

    def work(number):
        rng = np.random.default_rng(number)
        start.wait()
        try:
            for call in range(CALLS // THREADS):
                which = int(rng.integers(16))
                try:
                    if call % 4:
                        with m._alone():  # the call and the reading of its number, as the calls themselves do it
                            m._train(*batches[which], "sum", None, None, False, m._update(), False, None)
                            orders.append((m.step, which))
                    else:
                        looks[call // 4 % 3](which)
                        others[number] += 1
                except RuntimeError as error:
                    assert "in use by another thread" in str(error)
                    refused[number] += 1
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    print(f"{len(orders)} training calls and {sum(others)} others served, {sum(refused)} refused")
    assert len(orders) + sum(others) + sum(refused) == CALLS and len(orders) > 50
    orders.sort()
    assert [step for step, _ in orders] == list(range(1, len(orders) + 1))
    again = build(backend, streams=2, max_tokens=2)
    for _, which in orders:
        again.train_step_batch(*batches[which])
    assert contents(m) == contents(again)


@pytest.mark.parametrize("call", ["train_step_batch", "evaluate"])
def test_a_refused_call_is_no_obstacle(backend, call):
    m = build(backend, streams=2, max_tokens=2)
    with m._alone(), pytest.raises(RuntimeError, match="in use by another thread"):
        m.train_step_batch(*batch(0, 2, 2))
    arguments = batch(0, 2, 2)
    getattr(m, call)(*(arguments if call == "train_step_batch" else arguments[:2]))
