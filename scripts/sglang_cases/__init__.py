"""The plug-in in a real SGLang on a CPU: `scripts/sglang` runs `python -m sglang_cases`.

requirements.txt   what SGLang needs on a CPU, pinned
stubs/             what is missing without a GPU, through PYTHONPATH; no file of SGLang changes
lab/               a second plug-in: it sees what is sent, and kills at chosen points
model.py           a tiny Qwen2.5-VL of random weights
servers.py         SGLang's servers, and requests to them
watching.py        what the lab saw, and what is in a pool
cases.py           what must hold
handover.py        what the hand-over costs
"""
