"""How far each layer is pushed: norms and the laws that scale by them."""
