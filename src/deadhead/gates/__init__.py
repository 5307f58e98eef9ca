"""Hard-concrete gates, their penalty, their targets and their optimizer. Nothing here depends on models."""
