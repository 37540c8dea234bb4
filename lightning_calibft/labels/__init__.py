"""Map the labels of a dataset to the rows of the head."""
