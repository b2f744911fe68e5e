"""Tests of waiting for blocks: the wait queue, its fairness, and those who drop out of it."""
