"""The one error that the data code raises for what a user can mend."""


class DataError(ValueError):
    """Data, a tokenizer file or a data flag is unusable; the message says what was found and what to do."""
