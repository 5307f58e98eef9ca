"""Models on disk, dense, gated or cut, and what is checked before one is loaded."""
