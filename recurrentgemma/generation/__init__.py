"""Everything that continues or scores text with a model."""
