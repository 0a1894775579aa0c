"""Adapters on disk, LoRA and bottleneck ones, and the low-rank products that LoRA changes are."""
