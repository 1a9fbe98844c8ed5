"""An error as one line for a person."""


def error_line(error: Exception) -> str:
    """Returns what an error says; a system's error without its number, the file's name first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
