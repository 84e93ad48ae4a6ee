"""Slots that exchange in step: of one host through memory which each lays open to the others, of several by collectives."""
