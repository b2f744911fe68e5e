from vllm.entrypoints.llm import LLM as LLM
from vllm.sampling_params import SamplingParams as SamplingParams

__version__: str
