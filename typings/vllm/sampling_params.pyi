class SamplingParams:
    def __init__(
        self,
        *,
        temperature: float = ...,
        max_tokens: int = ...,
        ignore_eos: bool = ...,
        logprobs: int | None = ...,
        extra_args: dict[str, object] | None = ...,
    ) -> None: ...
