"""Conversations as tokens: tokenizer, chat templates, the two modes."""
