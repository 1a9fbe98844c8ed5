"""The conversion itself: reading, writing, resuming after a kill, rewriting finished files."""
