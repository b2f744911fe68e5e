"""All workers of a test run on one pool at once."""
