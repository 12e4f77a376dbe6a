"""The question, as a user writes it: the types of its file, what its names stand for, and its what-if entries."""
