"""One suite for every kind of pool, and for every queue that a handle can cross."""
