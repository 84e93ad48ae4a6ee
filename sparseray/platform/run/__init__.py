"""A run on disk: folder, journal, checkpoints, events, and the list of runs."""
