"""The conversion itself: writing, resuming after a kill, rewriting finished files."""
