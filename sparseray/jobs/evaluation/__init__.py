"""What `sparseray evaluate` measures of a checkpoint, and with what certainty."""
