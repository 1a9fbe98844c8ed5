"""The model's chat dialect: messages to prompts, output text to reasoning, content and tool calls."""
