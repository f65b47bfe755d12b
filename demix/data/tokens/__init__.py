"""Text as ids: tokenizers, the token store, sequences cut from it."""
