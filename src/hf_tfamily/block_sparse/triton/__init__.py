"""The block-sparse engine on NVIDIA GPUs, by Triton kernels. Triton itself is imported at the first call."""
