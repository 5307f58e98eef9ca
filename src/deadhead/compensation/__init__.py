"""Compensation: after a cut, fit output projections to the dense model's outputs; fits that do not help are undone."""
