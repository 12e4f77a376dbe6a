"""Where things are: node templates and counts, the fabric, placement of ranks, routes."""
