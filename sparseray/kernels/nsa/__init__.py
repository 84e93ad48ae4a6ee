"""Native sparse attention: compression, selection, window; training, prefill and decoding."""
