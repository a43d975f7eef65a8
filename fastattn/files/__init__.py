"""Inputs and outputs of attention as .npz and .safetensors files."""
