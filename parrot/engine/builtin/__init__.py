"""The builtin engine's model side: runner, models, attention, KV cache, sampler. EngineCore decides, this computes."""
