"""Which units stay: the head plan, scores that make a plan, and the head map in characters."""
