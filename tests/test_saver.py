"""Writing beside training: in order, bounded, nothing lost, errors told."""

import threading
import time

import pytest
from command import until

from vitcli.training.saver import Saver


def test_writing_goes_on_beside_and_all_of_it_is_done_in_order_at_the_end():
    gate, done = threading.Event(), []
    with Saver() as saver:
        saver.begin(lambda: (gate.wait(100), done.append("best")))
        saver.begin(lambda: done.append("checkpoint"))
        assert done == []
        gate.set()
    assert done == ["best", "checkpoint"]


def test_a_third_waits_for_the_first():
    gate, done = threading.Event(), []
    with Saver() as saver:
        saver.begin(lambda: (gate.wait(100), done.append(1)))
        saver.begin(lambda: done.append(2))
        threading.Timer(0.2, gate.set).start()
        saver.begin(lambda: done.append(3))
        assert done[:1] == [1]
    assert done == [1, 2, 3]


def fail():
    raise OSError("disk full")


def steps_until_it_is_told(saver):
    saver.begin(fail)
    until(saver.check)


def test_an_error_is_raised_by_a_later_step():
    with Saver() as saver, pytest.raises(OSError, match="disk full"):
        steps_until_it_is_told(saver)


def test_an_error_is_raised_at_the_end():
    with pytest.raises(OSError, match="disk full"), Saver() as saver:
        saver.begin(fail)


def spoilt_by_another():
    with Saver() as saver:
        saver.begin(fail)
        raise KeyError("first")


def test_another_error_on_its_way_is_the_one_that_is_told():
    with pytest.raises(KeyError, match="first"):
        spoilt_by_another()


def test_nothing_is_written_after_an_error():
    done = []

    def two():
        with Saver() as saver:
            saver.begin(fail)
            saver.begin(lambda: done.append("checkpoint"))

    with pytest.raises(OSError, match="disk full"):
        two()
    assert done == []


def test_waiting_until_all_is_done():
    done = []
    with Saver() as saver:
        saver.begin(lambda: (time.sleep(0.1), done.append(1)))
        saver.wait()
        assert done == [1]
