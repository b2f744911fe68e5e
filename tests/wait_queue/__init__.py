"""Tests of blocking allocation: the wait queue, its fairness, and those who drop out of it."""
