"""The exceptions a user may see; a leaf that every part may import.

Each message says what is wrong, where, the value, and what to do. The command line turns
a `UserError` into one line on stderr and exit code 2; anything else is a defect of ours.
"""


class UserError(Exception):
    """A mistake in what the user gave; the message names the place and the cure."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot be used."""


class DataError(UserError):
    """Token shards, sources or tokenizers that are missing, empty or changed."""


class CheckpointError(UserError):
    """A checkpoint that is truncated, tampered with, or of another model."""


class IdentityError(UserError):
    """A DSE layout that differs from the one that addressed the table rows."""


class ClusterError(UserError):
    """Ray is missing, refuses the token, or has too few free slots."""


class RunFailedError(RuntimeError):
    """A run that stopped by itself; its checkpoints are whole and it can be resumed."""


class SlotLostError(RuntimeError):
    """A slot did not answer within its deadline, or its process is gone."""
