"""The prefix cache: which session serves a prompt, what it shares, what is kept on disk."""
