"""The one error of an evaluation that its user can mend."""


class EvaluationError(ValueError):
    """A text, a task or a result that cannot be evaluated; the message says what was found and what to do."""
