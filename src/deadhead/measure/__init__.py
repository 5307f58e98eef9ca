"""What a model is worth: costs on paper, times, perplexity."""
