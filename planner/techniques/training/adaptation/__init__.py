"""What of a model is trained: all of it, or small additions to frozen weights."""
