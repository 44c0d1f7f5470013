"""The hot operations. Each folder holds one operation; ``reference.py`` is its plain PyTorch truth."""
