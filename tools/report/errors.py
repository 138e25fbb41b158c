"""What is wrong with a record."""


class RecordError(ValueError):
    """A record is damaged, unfinished or contradicts another. The message is one sentence."""
