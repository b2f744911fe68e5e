"""Tests of blocking allocation: the waiting line, its fairness, and those who drop out of it."""
