"""What a model is worth, and whether it is what it should be."""
