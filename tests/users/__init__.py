"""Programs that people write around a library like this one, each run as a process of its own."""
