"""From files to tokens: the vocabulary, chat templates, prompts with responses, and batches of sequences.

Knows no masks, and of a model its vocabulary only.
"""
