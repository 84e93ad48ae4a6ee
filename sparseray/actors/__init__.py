"""What runs in a slot, without Ray: the event loop here, and below it work, exchange, state, messages."""
