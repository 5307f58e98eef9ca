"""Recipes: everything that decides a run."""
