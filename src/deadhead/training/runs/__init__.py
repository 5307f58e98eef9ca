"""Whole runs and single phases, in folders."""
