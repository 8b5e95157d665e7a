"""What a model is made of: module catalogue, families as data, checkpoint reading and writing, loading."""
