"""Many processes on one pool, killed and stopped at random, and every byte checked."""
