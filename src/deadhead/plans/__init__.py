"""Which units stay: the head plan, scores that make one, and how a plan looks in characters."""
