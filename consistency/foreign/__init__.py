"""Networks of other projects as ours: names and shapes of tensors, and what their forward means.

One file per layout, pure mappings from tensors (and constructor arguments) to a description and
weights of ours. Reading the files, which are not to be trusted, is `pipelines.foreign_file`'s.
"""
