"""What a model reads: texts, corpora, images and their tokens."""
