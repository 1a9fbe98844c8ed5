"""The model's chat markup: its tags and control tokens, as its chat template writes them. No other module spells them.

It is on the ground floor because the native model, far below the chat, must know the token that begins a message.
"""

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
"""Around a message. Its role follows the first one, on the same line."""
ASSISTANT_START = f"{TURN_START}assistant\n"
THINK, THINK_END = "<think>", "</think>"
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function", "</function>"
PARAMETER, PARAMETER_END = "<parameter", "</parameter>"
"""FUNCTION and PARAMETER go on with `=NAME>`."""


def function_tag(name: str) -> str:
    """Returns the tag that begins a call of a function."""
    return f"{FUNCTION}={name}>"


def parameter_tag(name: str) -> str:
    """Returns the tag that begins a parameter's value."""
    return f"{PARAMETER}={name}>"
