"""Organs: contiguous layers as files of their own, cut out of one model, put into another, and taken out again."""
