"""Real models on real data, each trained with torch's loss and with torchce's: ``python -m examples``."""
