import random

import pytest

from hf_scan.model.stage_scheduler import StageScheduler


class Samples(list):
    """Numbers, of which the remainder by the number of stages says where each leaves."""

    numbers = list.copy

    def select(self, rows):
        return Samples(self[rows] if isinstance(rows, slice) else [self[row] for row in rows])

    @staticmethod
    def join(groups):
        return Samples(number for group in groups for number in group)


@pytest.fixture
def ran():
    return []


@pytest.fixture
def scheduler(ran):
    def advance(index, group):
        ran.append((index, list(group)))
        stay = Samples(number for number in group if number % 3 > index)
        return [number for number in group if number not in stay], stay or None

    return StageScheduler(3, 4, advance)


def test_full_batches_run_the_deepest_first(scheduler, ran):
    scheduler.put(Samples([1, 2, 4, 5, 7, 8, 10, 11]))
    assert list(scheduler.run()) == [1, 4, 7, 10, 2, 5, 8, 11]
    assert [index for index, _ in ran] == [0, 1, 0, 1, 2]
    assert all(len(group) == 4 for _, group in ran)


def test_what_is_left_of_a_group_comes_first(scheduler, ran):
    scheduler.put(Samples([0, 3, 6]))
    scheduler.put(Samples([9, 12, 15]))
    assert list(scheduler.run()) == [0, 3, 6, 9]
    assert len(scheduler) == 2
    assert list(scheduler.run(all_that_wait=True)) == [12, 15]


def test_without_a_batch_the_deepest_that_waited_long_enough(scheduler, ran):
    scheduler.put(Samples([2, 3]), since=10.0)
    assert scheduler.next_stage() is None
    assert scheduler.next_stage(since=9.0) is None
    assert scheduler.next_stage(since=10.0) == 0
    assert scheduler.step(0) == [3]
    scheduler.put(Samples([6]), since=11.0)
    assert scheduler.oldest() == 10.0
    # An image waits once: in front of the next stage since it arrived.
    assert [scheduler.next_stage(since=time) for time in (9.0, 10.0, 11.0)] == [None, 1, 1]
    assert scheduler.next_stage(all_that_wait=True) == 0


def test_samples_are_removed_wherever_they_wait(scheduler, ran):
    scheduler.put(Samples([1, 2, 4, 5]))
    scheduler.step(0)
    scheduler.put(Samples([7, 8]))
    scheduler.put(Samples([10]))
    assert scheduler.remove({2, 8, 10, 99}) == [8, 10, 2]
    assert [len(queue) for queue in scheduler.queues] == [1, 3, 0]
    assert sorted(scheduler.run(all_that_wait=True)) == [1, 4, 5, 7]
    assert scheduler.oldest() is None


def test_each_sample_is_answered_once_in_any_order_of_events():
    rng = random.Random(0)
    for _ in range(50):
        answered, removed = [], []
        batch_size = rng.randint(1, 9)

        def advance(index, group, batch_size=batch_size):
            assert 0 < len(group) <= batch_size
            stay = Samples(number for number in group if number % 4 > index)
            return [number for number in group if number not in stay], stay or None

        scheduler = StageScheduler(4, batch_size, advance)
        for start in range(0, 60, 6):
            scheduler.put(Samples(range(start, start + 6)), since=start)
            removed += scheduler.remove({rng.randrange(60)})
            if rng.random() < 0.5:
                answered += scheduler.run()
            elif (index := scheduler.next_stage(since=start)) is not None:
                answered += scheduler.step(index)
        answered += scheduler.run(all_that_wait=True)
        assert sorted(answered + removed) == list(range(60))
