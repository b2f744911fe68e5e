"""Qwen2.5-VL and Qwen3-VL with the vision tower in one process and the language model in others.

Start with README.md beside this file. The programs are `demo`, `serve`, `load` and `latency`, each
started from the folder above: `python -m qwen_vl.demo`.
"""

from __future__ import annotations
