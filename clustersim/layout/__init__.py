"""How the work is divided: the layout types, their space, their memory."""
