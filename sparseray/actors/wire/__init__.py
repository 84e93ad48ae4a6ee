"""How slots speak: typed messages, frames, and the mailbox that fences and orders them."""
