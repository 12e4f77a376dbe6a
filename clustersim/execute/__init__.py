"""Runs a plan on real devices with torch.distributed, and measures it; the only room that imports torch."""
