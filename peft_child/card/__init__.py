"""What people read about an adapter: the model card and its heat map."""
