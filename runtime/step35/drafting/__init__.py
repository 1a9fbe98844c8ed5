"""Draft tokens from the MTP heads and from the prompt, and how many are worth verifying."""
