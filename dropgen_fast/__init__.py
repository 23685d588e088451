"""dropgen_fast."""
