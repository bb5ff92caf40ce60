"""Text as a language model sees it: chat templates, supervised tokens, generation."""
