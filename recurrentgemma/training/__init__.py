"""Training: documents, packed rows, loss, optimizer, the loop and its checkpoints."""
