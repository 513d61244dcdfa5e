"""The errors that users see: one line that says what is wrong, where, and what to do."""

__all__ = ["DiffsalError"]


class DiffsalError(Exception):
    """Something a user can put right. Its message is one line and ends with what to do."""
