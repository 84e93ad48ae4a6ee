"""Dense operations of a step: head with loss, norms, rotary encoding, SwiGLU, AdamW, gradient of an embedding."""
