"""Training data: clips as latents with the embeddings of their captions."""
