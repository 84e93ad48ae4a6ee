"""Pure functions: who holds what, what moves, what to do next."""
