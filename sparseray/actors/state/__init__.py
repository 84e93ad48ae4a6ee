"""What a slot holds of the model: pieces, their optimizer state, and who holds which."""
