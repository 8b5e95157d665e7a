"""Variants: what they are, how a sweep plans them, and how they are put into a model, or into a checkpoint, and taken out."""
