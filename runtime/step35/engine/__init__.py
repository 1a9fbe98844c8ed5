"""A loaded model (engine), its timelines of tokens (sessions), and the loop that decodes them."""
