"""Texts of others: rows of files, chat templates, and what becomes of them before the tokenizer."""
