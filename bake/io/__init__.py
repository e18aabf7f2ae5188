"""Files that others wrote: their JSON, the names in it, and the text that ends up in front of a person."""
