"""Files of examples: read, recognised, split, turned into tokens and batched."""
