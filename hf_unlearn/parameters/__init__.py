"""Geometry around a reference point θ*: anchors, repulsion, LoRA products, Fisher information, moments over checkpoints."""
