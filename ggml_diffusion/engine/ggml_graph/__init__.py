"""The engine on any GGML device: the network as graphs of forward operations."""
