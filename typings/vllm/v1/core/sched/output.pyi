class SchedulerOutput:
    free_encoder_mm_hashes: list[str]
