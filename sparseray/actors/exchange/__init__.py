"""Where experts and rows are, and how gradients meet: one exchange for each generation of a slot."""
