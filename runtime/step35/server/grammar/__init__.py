"""JSON schemas and tools as GBNF grammars."""
