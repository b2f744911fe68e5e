"""What the GPU part of a pool does, where there is no GPU: over a driver made of lists."""
