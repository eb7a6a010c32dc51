"""The one error of an analysis that its user can mend."""


class AnalysisError(ValueError):
    """A model, data set or record that cannot be analysed; the message says what was found and what to do."""
