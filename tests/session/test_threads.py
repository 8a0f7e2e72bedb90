"""Several threads ask one session."""

import threading

from sessions import PROMPT, SECONDS, at_forward
from tiny_models import prompt_ids

from nblens import UserError


def test_requests_from_several_threads_are_served_one_at_a_time_and_belong_to_their_callers(session):
    prompts = [prompt_ids(4 + i, seed=i) for i in range(4)]
    steers = [{}, {"v": 2.0}, {"w": -1.0}, {"v": -1.0, "w": 1.0}]
    expected = [session.generate(p, 6, steer=s).token_ids for p, s in zip(prompts, steers, strict=True)]
    results, threads_seen = {}, set()

    def ask(i):
        results[i] = [session.generate(prompts[i], 6, steer=steers[i]).token_ids for _ in range(3)]

    with at_forward(session, lambda number: threads_seen.add(threading.current_thread().name)):
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert results == {i: [expected[i]] * 3 for i in range(4)}
    assert threads_seen == {"nblens-worker"}


def test_a_mistake_in_one_thread_does_not_reach_another(session):
    expected = session.generate(PROMPT, 5).token_ids
    errors, results = [], []

    def wrong():
        for _ in range(5):
            try:
                session.generate(PROMPT, 5, top_q=1)
            except UserError as error:
                errors.append(error)

    def right():
        results.extend(session.generate(PROMPT, 5).token_ids for _ in range(5))

    threads = [threading.Thread(target=wrong), threading.Thread(target=right)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(errors) == 5
    assert results == [expected] * 5
