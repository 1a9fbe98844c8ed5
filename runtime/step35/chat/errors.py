"""What is wrong with a conversation, without a word of how it came here."""

from step35.errors import Step35Error


class BadConversation(Step35Error):
    """A conversation can't become a prompt; `param` is the field of a request that is to blame, if one is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
