"""Measurements of a model: costs on paper, times, perplexity, replies, tasks."""
