"""producer.py and consumer.py, started as a user starts them: two programs and a name."""

from __future__ import annotations

import signal

from tests.examples.terminal import Terminal

ENDLESS = ("--requests", "1000000")


def producer(name: str, *arguments: str) -> Terminal:
    return Terminal("producer.py", "--name", name, *arguments)


def consumer(name: str, *arguments: str) -> Terminal:
    return Terminal("consumer.py", "--name", name, *arguments)


def assert_all_went_over(making: Terminal, reading: Terminal, requests: int) -> None:
    assert (making.wait(), reading.wait()) == (0, 0), making.text + reading.text
    assert f"{requests} read, {requests} right, 0 wrong" in reading.text
    assert f"{requests} sent; 64 of 64 blocks free" in making.text
    assert sum("right" in line for line in reading.lines) == requests + 1


def test_a_consumer_that_starts_second_reads_everything(pool_name: str) -> None:
    with producer(pool_name, "--requests", "12") as making:
        making.wait_for("waiting for a consumer")
        with consumer(pool_name) as reading:
            assert_all_went_over(making, reading, 12)


def test_a_consumer_that_starts_first_reads_everything(pool_name: str) -> None:
    with consumer(pool_name) as reading:
        reading.wait_for("waiting for the pool")
        with producer(pool_name, "--requests", "12") as making:
            assert_all_went_over(making, reading, 12)


def test_ctrl_c_on_both_sides_leaves_nothing(pool_name: str) -> None:
    with producer(pool_name, *ENDLESS) as making, consumer(pool_name) as reading:
        reading.wait_for("request  10")
        making.press_ctrl_c()
        reading.press_ctrl_c()
        assert (making.wait(), reading.wait()) == (130, 130), making.text + reading.text
        assert "producer: stopped" in making.text
        assert "consumer: stopped" in reading.text
        assert "Traceback" not in making.text + reading.text


def test_ctrl_c_while_waiting_for_a_consumer_leaves_nothing(pool_name: str) -> None:
    with producer(pool_name) as making:
        making.wait_for("waiting for a consumer")
        making.press_ctrl_c()
        assert making.wait() == 130
        assert making.lines[-1] == "producer: stopped"


def test_a_producer_that_is_stopped_tells_the_consumer(pool_name: str) -> None:
    with producer(pool_name, *ENDLESS) as making, consumer(pool_name) as reading:
        reading.wait_for("request  10")
        making.send(signal.SIGTERM)
        assert making.wait() == 130
        assert reading.wait() == 1
        assert "consumer: the producer went away" in reading.lines[-1]


def test_a_killed_consumer_ends_the_producer_with_a_message(pool_name: str) -> None:
    with producer(pool_name, *ENDLESS) as making, consumer(pool_name) as reading:
        reading.wait_for("request  10")
        reading.send(signal.SIGKILL)
        assert reading.wait() == -signal.SIGKILL
        assert making.wait() == 1
        assert "producer: the consumer went away" in making.lines[-1]


def test_a_consumer_that_outlives_a_killed_producer_removes_the_pool(pool_name: str) -> None:
    with producer(pool_name, *ENDLESS) as making, consumer(pool_name) as reading:
        reading.wait_for("request  10")
        # Stopped until the producer is gone with all its locks: a consumer that leaves while the
        # producer is only dying would not be the last one.
        reading.stop()
        making.send(signal.SIGKILL)
        assert making.wait() == -signal.SIGKILL
        reading.send(signal.SIGCONT)
        assert reading.wait() == 1
        assert "consumer: the producer went away" in reading.lines[-1]


def test_a_new_producer_takes_the_place_of_a_killed_one(pool_name: str) -> None:
    with producer(pool_name) as killed:
        killed.wait_for("waiting for a consumer")
        killed.send(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    with producer(pool_name, "--requests", "3") as making, consumer(pool_name) as reading:
        assert_all_went_over(making, reading, 3)


def test_a_producer_without_a_consumer_says_what_to_start(pool_name: str) -> None:
    with producer(pool_name, "--timeout", "0.5") as making:
        assert making.wait() == 1
        assert "no consumer came within 0.5 s" in making.lines[-1]
        assert f"python examples/consumer.py --name {pool_name}" in making.lines[-1]


def test_a_consumer_without_a_producer_says_what_to_start(pool_name: str) -> None:
    with consumer(pool_name, "--timeout", "0.5") as reading:
        assert reading.wait() == 1
        assert pool_name in reading.lines[-1]
        assert f"python examples/producer.py --name {pool_name}" in reading.text


def test_a_second_producer_of_one_name_is_refused(pool_name: str) -> None:
    with producer(pool_name) as first:
        first.wait_for("waiting for a consumer")
        with producer(pool_name) as second:
            assert second.wait() == 1
            assert "a living pool or queue holds the name" in second.lines[-1]
        first.press_ctrl_c()
        assert first.wait() == 130
