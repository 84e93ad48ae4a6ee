"""Slots of one host that exchange through memory which each lays open to the others, as GPUs do."""
