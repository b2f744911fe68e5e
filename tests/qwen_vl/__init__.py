"""examples/qwen_vl: the split model against the unsplit one, and its server under fire."""
