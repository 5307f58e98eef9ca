"""Compensation: after a cut, output projections are fitted to what the dense model computes, never for the worse."""
