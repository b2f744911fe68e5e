"""Real vLLM engines on the connector, on a CPU: `scripts/vllm`.

models   two tiny models with random weights, made on the spot
photos   what they are asked about
actor    one engine in a process of its own       engines  starts, asks and kills them
cases    what must hold, offline                  serving  `vllm serve`, behind a router
compare  beside vLLM's own connectors (rivals)    first_token  of a picture that another had
"""
