"""What learns: hard-concrete gates, their penalty, their targets and their optimizer. Knows nothing of models."""
