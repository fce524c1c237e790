"""Looking at a model: perplexity, generation, quality by linear, exports against the model."""
