"""Training in a slot: data by (step, part), the forward and backward pass of a part."""
