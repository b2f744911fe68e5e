"""From `create` to the end of a process, in every situation in which processes live and end."""
