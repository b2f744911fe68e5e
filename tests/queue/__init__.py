"""Tests of `HandleQueue` and of the waiting under it."""
